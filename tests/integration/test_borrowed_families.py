"""Families through transformers' own code: as exact as transformers, and every row's bits its own.

The yardsticks are those of test_transformers_parity.py: float32 arithmetic on the same weights is the reference, what
transformers itself loses in bfloat16 is the tolerance. Where experts are chosen, one rounding may choose others: the
reference is then not close to itself either, so that medians are compared.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.core import EngineCore
from engine.model_runner import ModelRunner
from engine.request import GenerationRequest, Pooling
from tests.support.engine_core import Output, make_request, run_all
from tests.support.invariance import bits, others, prompt
from tests.support.model_engine import load_model, logits_of, model_core
from tests.support.reference import Reference, load_reference
from tests.support.tiny_families import BORROWED, WINDOW

LENGTHS = (1, 2, 15, 17, 33, WINDOW, WINDOW + 1, 130, 257, 300)
NEW_TOKENS = 10
EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe")


@pytest.fixture(params=BORROWED)
def directory(request: pytest.FixtureRequest, tiny_families: dict[str, Path]) -> Path:
    return tiny_families[request.param]


def reference(directory: Path) -> Reference:
    return load_reference(directory, attn_implementation="eager", experts_implementation="eager")


def test_logits_are_as_close_to_float32_as_those_of_transformers_in_bfloat16(directory: Path) -> None:
    prompts = [prompt(length) for length in LENGTHS]
    ours_lost, theirs_lost = [], []
    for text, ours in zip(prompts, logits_of(load_model(directory), prompts), strict=True):
        exact, rounded = reference(directory).logits(text)
        ours_lost.append((ours - exact).pow(2).mean(dim=-1).sqrt() / exact.std())
        theirs_lost.append((rounded - exact).pow(2).mean(dim=-1).sqrt() / exact.std())
    mine, yours = torch.cat(ours_lost), torch.cat(theirs_lost)
    assert float(mine.median()) < 1.25 * float(yours.median())
    assert float(mine.median()) < 0.05
    if directory.name not in EXPERTS:
        assert float(mine.max()) < 0.2


def test_greedy_tokens_are_those_of_transformers_except_at_ties(directory: Path) -> None:
    lengths = (1, 17, WINDOW - 3, 130, 257)
    requests = [
        make_request(str(length), prompt(length), NEW_TOKENS, temperature=0.0, ignore_eos=True) for length in lengths
    ]
    outputs = run_all(model_core(load_model(directory)), requests)
    whole = 0
    for length in lengths:
        ours = outputs[str(length)].tokens
        theirs = reference(directory).generate(prompt(length), NEW_TOKENS)
        whole += ours == theirs
        if ours != theirs:
            assert_tied(directory, prompt(length), ours, theirs)
    assert whole >= 2  # the rest left the path at a tie


def assert_tied(directory: Path, text: list[int], ours: list[int], theirs: list[int]) -> None:
    """Where the two part, the reference's difference between the tokens is within what bfloat16 loses."""
    at = next(index for index, (mine, yours) in enumerate(zip(ours, theirs, strict=True)) if mine != yours)
    exact, rounded = reference(directory).logits(text + theirs[:at])
    behind = float(exact[-1, theirs[at]] - exact[-1, ours[at]])
    assert behind <= 2 * max(float((rounded - exact).abs().max()), 0.05 * float(exact.std()))


# --- every row's bits are its own ---

INVARIANT_LENGTHS = (1, 17, WINDOW, 130, 270)


def ask(length: int, name: str = "") -> GenerationRequest:
    return make_request(
        name or str(length),
        prompt(length),
        NEW_TOKENS,
        seed=length,
        temperature=0.9,
        top_p=0.95,
        repetition_penalty=1.1,
        top_logprobs=20,
        ignore_eos=True,
    )


@cache
def alone(directory: Path, length: int) -> tuple[object, ...]:
    return bits(run_all(model_core(load_model(directory)), [ask(length, "r")])["r"])


def assert_as_alone(directory: Path, outputs: dict[str, Output]) -> None:
    for length in INVARIANT_LENGTHS:
        assert bits(outputs[str(length)]) == alone(directory, length)


def test_neighbours_and_chunks_change_no_bit(directory: Path) -> None:
    for count, chunk in ((1, 1024), (13, 100), (40, 16)):
        core = model_core(load_model(directory), 1024, token_budget=64 + 17 * count, chunk_tokens=chunk)
        beside, mine = others(count), [ask(length) for length in INVARIANT_LENGTHS]
        assert_as_alone(directory, run_all(core, [*beside[: count // 2], *mine, *beside[count // 2 :]], check=False))


def test_a_warm_cache_changes_no_bit(directory: Path) -> None:
    for warm in (16, 64, 96, 256):
        core = model_core(load_model(directory), chunk_tokens=100)
        run_all(core, [make_request("warm", prompt(warm + 1), 1)])
        output = run_all(core, [ask(270)])["270"]
        assert output.stats is not None
        assert output.stats.cached_tokens == warm
        assert bits(output) == alone(directory, 270)


def test_preemption_changes_no_bit(directory: Path) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        while step % 4 == 3 and core.scheduler.running:
            core.scheduler.preempt_youngest()

    core = model_core(load_model(directory), 24, token_budget=64, chunk_tokens=64)
    outputs = run_all(core, [*others(6), *(ask(length) for length in INVARIANT_LENGTHS)], before_step=preempt)
    assert core.metrics().preemptions > 0
    assert_as_alone(directory, outputs)


def test_going_through_a_recorded_output_gives_the_bits_of_generating_it(directory: Path) -> None:
    again = [
        replace(ask(length), forced=tuple(alone(directory, length)[0]), cache_salt=b"%d" % length)  # type: ignore[arg-type]
        for length in INVARIANT_LENGTHS
    ]
    core = model_core(load_model(directory), 1024, chunk_tokens=100, token_budget=200)
    assert_as_alone(directory, run_all(core, [*others(3), *again], check=False))


def test_a_vector_is_the_same_whatever_stands_beside_its_text(directory: Path) -> None:
    read = replace(make_request("r", prompt(130), 1), pooling=Pooling.MEAN)
    single = run_all(model_core(load_model(directory)), [read])["r"].embedding
    core = model_core(load_model(directory), 1024, chunk_tokens=33, token_budget=200)
    assert single is not None
    assert run_all(core, [*others(3), read])["r"].embedding == single


def test_what_others_left_in_the_cache_is_never_read(directory: Path) -> None:
    runner = ModelRunner(load_model(directory).decoder, 64)
    for layer in runner.caches:
        for tensor in (layer.key, layer.value):
            tensor[:-1] = torch.nan
    assert bits(run_all(model_core(load_model(directory), runner=runner), [ask(130)])["130"]) == alone(directory, 130)
