"""The engine by the kernels: what it says on a CPU, to within bfloat16; and its own bits whatever is computed beside.

On a GPU the models are larger, and products and attention are those that start-up chooses. In the interpreter nothing
is chosen, and every step takes a tenth of a second and more: few steps, short texts.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.device import ATTENTION, open_device
from engine.load import load_engine
from engine.model_loading import load_device_model
from engine.models.arithmetic import Adapter
from engine.models.triton_arithmetic import PRODUCTS
from engine.plan import Draw, RowPlan, Score, StepInterrupted, StepPlan, never
from engine.reading import Reading
from engine.replay import ReplayOutcome, ReplayVerdict, force
from engine.request import GenerationRequest, Pooling, SamplingParams
from kernels.jit import INTERPRETED
from tests.support import invariance
from tests.support.device_engine import (
    FAMILIES,
    SMALL,
    TINY,
    OnDevice,
    adapter_of,
    core_on,
    cpu_runner,
    on_device,
    write_parameters,
)
from tests.support.engine_core import Output, make_request, run_all
from tests.support.invariance import bits, sampled
from tests.support.tiny_models import write_model

LENGTHS = (1, 20) if INTERPRETED else (1, 15, 16, 17, 63, 64, 65, 129, 255, 256, 257, 300, 520)
NEW_TOKENS = 2 if INTERPRETED else 12
MODELS = ("qwen3",) if INTERPRETED else FAMILIES
BLOCKS = 64 if INTERPRETED else 1024
LOSS = 0.25 if INTERPRETED else 0.5  # of a log-probability: what two orders of summation in bfloat16 may differ by


@pytest.fixture(scope="module")
def device(device: torch.device) -> torch.device:
    return device if INTERPRETED else open_device(device.type)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, device: torch.device) -> OnDevice:
    return on_device(request.param, device)


def core_of(model: OnDevice, adapters: dict[str, Adapter] | None = None, **limits: int) -> EngineCore:
    return core_on(model.runner(BLOCKS, adapters), model.config, adapters, **limits)


def prompt(model: OnDevice, length: int, start: int = 5) -> list[int]:
    return invariance.prompt(length, start, model.config.vocab_size)


def ask(model: OnDevice, length: int, name: str = "") -> GenerationRequest:
    return sampled(length, NEW_TOKENS, name, model.config.vocab_size)


def others(model: OnDevice) -> list[GenerationRequest]:
    """Each wishes for something else, or for nothing."""
    wishes: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"top_p": 0.5, "top_logprobs": 3},
        {"logit_bias": tuple((token, 0.5) for token in range(30))},
        {"allowed_tokens": (7, 9, 40), "temperature": 0.0},
        {"prompt_logprobs": 2, "presence_penalty": 0.5},
    ]
    count = 3 if INTERPRETED else 20
    return [
        make_request(
            f"other-{n}", prompt(model, 1 + 5 * n % 60, n), 1 + n % 2 + n // 3 % 2, seed=n, **wishes[n % len(wishes)]
        )
        for n in range(count)
    ]


@cache
def alone(model: OnDevice, length: int) -> tuple[object, ...]:
    return bits(run_all(core_of(model), [ask(model, length, "r")])["r"])


def assert_as_alone(model: OnDevice, outputs: dict[str, Output]) -> None:
    for length in LENGTHS:
        assert bits(outputs[str(length)]) == alone(model, length)


# --- beside the CPU ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_it_says_on_a_cpu(family: str, device: torch.device) -> None:
    model = on_device(family, device)
    greedy = {"temperature": 0.0, "top_logprobs": 2, "ignore_eos": True}
    lengths = (2, 9) if INTERPRETED else LENGTHS[1:]
    asked = [make_request(str(n), prompt(model, n), NEW_TOKENS, prompt_logprobs=0, **greedy) for n in lengths]
    read = [replace(asked[-1], request_id=pooling, pooling=pooling) for pooling in Pooling]
    expected = run_all(core_on(cpu_runner(model.config, BLOCKS), model.config), [*asked, *read])
    found = run_all(core_of(model), [*asked, *read])
    for request in asked:
        assert_near(found[request.request_id], expected[request.request_id])
    for pooling in Pooling:
        ours, theirs = (vector(output[pooling]) for output in (found, expected))
        assert float(ours @ theirs) > 0.999


def vector(output: Output) -> torch.Tensor:
    assert output.embedding is not None
    return torch.frombuffer(bytearray(output.embedding), dtype=torch.float32)


def assert_near(found: Output, expected: Output) -> None:
    """The same tokens up to where two were as good, and log-probabilities to within a loss."""
    for ours, theirs in zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert ours.token == theirs.token
        assert abs(ours.logprob - theirs.logprob) < LOSS
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        if ours.token != theirs.token:
            (_, best), (_, second) = theirs.top
            assert best - second < 2 * LOSS
            return
        assert abs(ours.logprob - theirs.logprob) < LOSS


def test_adapters_add_what_they_add_on_a_cpu_and_their_rows_do_not_see_each_other(device: torch.device) -> None:
    model = on_device("qwen2", device)
    adapters = {
        "all": adapter_of(model.config, 1, 5, ("qkv", "o", "gate_up", "down")),
        "some": adapter_of(model.config, 2, 3, ("qkv", "down")),
    }
    greedy = {"temperature": 0.0, "top_logprobs": 2, "prompt_logprobs": 0, "ignore_eos": True}
    asked = [
        replace(make_request(f"{name}", prompt(model, 6), 2, **greedy), adapter=name) for name in (*adapters, None)
    ]
    expected = run_all(core_on(cpu_runner(model.config, BLOCKS, adapters), model.config, adapters), asked)
    found = run_all(core_of(model, adapters), asked)
    digests = {bits(output)[2] for output in found.values()}
    assert len(digests) == len(asked)
    for request in asked:
        name = request.request_id
        assert_near(found[name], expected[name])
        assert bits(run_all(core_of(model, adapters), [request])[name]) == bits(found[name])
    assert bits(run_all(core_of(model), [asked[-1]])["None"]) == bits(found["None"])


# --- started ---


def test_what_start_up_chose_and_warmed_up_answers_as_what_was_given_and_cold(
    tmp_path: Path, device: torch.device
) -> None:
    write_parameters(tmp_path, "qwen3", TINY if INTERPRETED else SMALL)
    loaded = load_device_model(Reading(tmp_path), 3 if INTERPRETED else 600, device)
    assert set(loaded.policy["linear"].values()) <= set(PRODUCTS)  # type: ignore[attr-defined]
    assert loaded.policy["attention"] in ATTENTION
    adapters = {"one": adapter_of(loaded.config, 1, 2, ("o",))}
    core = core_on(loaded.runner(BLOCKS, adapters), loaded.config, adapters)
    request = make_request("r", [5, 6, 7], 2, temperature=0.0, ignore_eos=True)
    outputs = run_all(core, [request, replace(request, request_id="s", adapter="one")])
    assert bits(outputs["r"]) == bits(run_all(core_of(on_device("qwen3", device)), [request])["r"])  # cold, by itself
    assert bits(outputs["r"]) != bits(outputs["s"])


@pytest.mark.skipif(INTERPRETED, reason="the engine as a whole is loaded on a GPU")
def test_an_engine_on_a_gpu_answers_and_repeats_itself(tmp_path: Path, device: torch.device) -> None:
    answer_and_repeat(tmp_path, device.type)


def answer_and_repeat(directory: Path, device: str) -> None:
    write_model(directory, "qwen3")
    engine = load_engine(EngineConfig(directory, device=device, kv_cache_mib=16, max_tokens_per_step=256))
    request = make_request("r", range(5, 45), 16, temperature=0.8, seed=7, ignore_eos=True)

    async def ask_twice() -> ReplayVerdict:
        deltas = [delta async for delta in engine.generate(request)]
        tokens = [token for delta in deltas for token in delta.tokens]
        assert deltas[-1].stats is not None
        again = replace(request, request_id="again")
        recorded = deltas[-1].stats.replay_digest
        return await force(engine, again, recorded, recorded_policy=engine.numeric_policy, recorded_tokens=tokens)

    try:
        assert asyncio.run(ask_twice()).outcome is ReplayOutcome.IDENTICAL
    finally:
        engine.close()


# --- its own bits ---


@pytest.mark.parametrize("chunk", [16] if INTERPRETED else [16, 37, 100])
def test_chunks_and_neighbours_change_no_bit(model: OnDevice, chunk: int) -> None:
    beside = others(model)
    mine = [ask(model, length) for length in LENGTHS]
    core = core_of(model, chunk_tokens=chunk, token_budget=90)
    assert_as_alone(model, run_all(core, [*beside[::2], *mine, *beside[1::2]]))


def test_a_warm_cache_and_preemption_change_no_bit(model: OnDevice) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        if step == 1:
            core.scheduler.preempt_youngest()

    length = LENGTHS[-1]
    core = core_of(model)
    run_all(core, [make_request("warm", prompt(model, length - 3), 1)])
    output = run_all(core, [ask(model, length)], before_step=preempt)[str(length)]
    assert output.stats is not None
    assert output.stats.cached_tokens == (length - 4) // 16 * 16
    assert output.stats.preemptions == 1
    assert bits(output) == alone(model, length)


def test_going_through_a_recorded_output_gives_its_bits(model: OnDevice) -> None:
    recorded = {length: alone(model, length)[0] for length in LENGTHS}
    forced = [
        replace(ask(model, length), forced=tuple(tokens), cache_salt=b"%d" % length)  # type: ignore[arg-type]
        for length, tokens in recorded.items()
    ]
    assert_as_alone(model, run_all(core_of(model, chunk_tokens=37), forced, check=False))


def test_guesses_change_no_bit(model: OnDevice) -> None:
    """With two tokens to choose from, the model repeats itself."""

    def repeating(core: EngineCore) -> Output:
        few = {"temperature": 0.0, "allowed_tokens": (7, 40), "ignore_eos": True}
        return run_all(core, [make_request("r", prompt(model, 4), 8 if INTERPRETED else 30, top_logprobs=5, **few)])[
            "r"
        ]

    plain, guessing = core_of(model), core_of(model, trial_rows=16)
    assert bits(repeating(guessing)) == bits(repeating(plain))
    assert guessing.metrics().steps < plain.metrics().steps


def test_what_others_left_in_the_cache_is_never_read(model: OnDevice) -> None:
    clean, dirty = model.runner(16), model.runner(16)
    for cache_ in dirty.caches:
        for tensor in (cache_.key, cache_.value):
            tensor[:-1] = math.nan
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    # A table is longer than its context, and last blocks are filled in part; a row of many tokens stands first.
    rows = (
        RowPlan(tuple(prompt(model, 20)), 0, (0, 1), greedy, (Draw(19),), (Score(3, 5),)),
        RowPlan((5,), 0, (9, 2, 8), greedy, (Draw(0),)),
    )
    assert dirty.run(StepPlan(rows)) == clean.run(StepPlan(rows))


def test_a_step_given_up_within_layers_is_carried_out_again_to_the_same_bits(model: OnDevice) -> None:
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    plan = StepPlan((RowPlan(tuple(prompt(model, 20)), 0, (0, 1), greedy, (Draw(19),)),))
    whole = model.runner(4).run(plan)
    for asked in range(2 * model.config.num_hidden_layers):
        runner, answers = model.runner(4), iter([False] * asked + [True])
        with pytest.raises(StepInterrupted):
            runner.run(plan, lambda answers=answers: next(answers))  # type: ignore[misc]
        assert asked < 2 * model.config.num_hidden_layers - 1 or runner.run(plan, never) == whole
