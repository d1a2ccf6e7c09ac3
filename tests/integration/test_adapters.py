"""Adapters on a real model: as close to merged weights as bfloat16 allows, and the same bits among any neighbours.

Merged by hand into float32 weights, an adapter is a model that `transformers` runs: the reference, with what
`transformers` itself loses in bfloat16 as the yardstick.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.adapters import AdapterError, load_adapter, read_adapter
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.load import load_engine
from engine.models.arithmetic import Adapter
from engine.replay import ReplayOutcome, force, regenerate
from engine.request import GenerationRequest, Pooling, RequestRefused
from engine.runtime import EngineRuntime
from tests.support.adapters import ATTENTION, EVERY, merge, write_adapter
from tests.support.engine_core import Output, make_request, run_all
from tests.support.invariance import bits, prompt
from tests.support.model_engine import LoadedModel, load_model, logits_of, model_core
from tests.support.tiny_models import FAMILIES

MODELS = ("qwen2", "wide")  # with a bias on qkv; with products that the library computes in bits of its own with AMX
COUNTS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 64)
NAMES = (None, "all", "attention", "values")
NEW_TOKENS = 6


@dataclass(frozen=True, eq=False)
class Adapted:
    model: LoadedModel
    adapters: Mapping[str, Adapter]

    def core(self, **limits: int) -> EngineCore:
        return model_core(self.model, 1024, self.adapters, **limits)


@pytest.fixture(scope="module", params=MODELS)
def adapted(
    request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Adapted:
    directory, root = tiny_models[request.param], tmp_path_factory.mktemp("adapters")
    written = {
        "all": write_adapter(root / "all", directory, seed=1, rank=16),
        "attention": write_adapter(root / "attention", directory, seed=2, rank=3, targets=ATTENTION),
        "values": write_adapter(root / "values", directory, seed=3, rank=8, targets=("v_proj", "up_proj")),
    }
    model = load_model(directory)
    return Adapted(model, {name: load_adapter(read_adapter(path), model.config) for name, path in written.items()})


def ask(index: int, adapter: str | None) -> GenerationRequest:
    """Prompts are beginnings of one another: were blocks shared between adapters, it would show."""
    sampling = {"temperature": 0.9, "top_logprobs": 5, "ignore_eos": True}
    request = make_request(str(index), prompt(1 + 37 * index % 90), NEW_TOKENS, seed=index, **sampling)
    return replace(request, adapter=adapter)


def mixed(count: int, shift: int = 0) -> list[GenerationRequest]:
    return [ask(index, NAMES[(index + shift) % len(NAMES)]) for index in range(count)]


@cache
def alone(adapted: Adapted, index: int, adapter: str | None) -> tuple[object, ...]:
    return bits(run_all(adapted.core(), [ask(index, adapter)])[str(index)])


def assert_as_alone(adapted: Adapted, requests: list[GenerationRequest], outputs: Mapping[str, Output]) -> None:
    for index, request in enumerate(requests):
        assert bits(outputs[str(index)]) == alone(adapted, index, request.adapter)


# --- parity ---


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_merged_weights_within_bfloat16(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    directory = tiny_models[family]
    torch.set_num_threads(1)
    for name, targets, rooted in (("every", EVERY, True), ("attention", ATTENTION, False)):
        written = write_adapter(tmp_path / name, directory, rank=6, targets=targets, use_rslora=rooted)
        merged = merge(tmp_path / f"{name}-merged", directory, written)
        exact, rounded = (
            AutoModelForCausalLM.from_pretrained(merged, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
        model = load_model(directory)
        adapter = load_adapter(read_adapter(written), model.config)
        prompts = [prompt(length) for length in (2, 16, 17, 65, 257)]
        ours, base = torch.cat(logits_of(model, prompts, adapter)), torch.cat(logits_of(model, prompts))
        with torch.inference_mode():
            wanted, theirs = (
                torch.cat([reference(torch.tensor([tokens])).logits[0].float() for tokens in prompts])
                for reference in (exact, rounded)
            )
        assert distance(ours, wanted) < 1.5 * distance(theirs, wanted)
        assert distance(ours, wanted) < 0.2 * distance(base, wanted)  # it is the adapter that brings them there


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).pow(2).mean().sqrt())


# --- invariance ---


@pytest.mark.parametrize("count", COUNTS)
def test_neighbours_on_other_adapters_change_no_bit(adapted: Adapted, count: int) -> None:
    requests = mixed(count, shift=count)
    assert_as_alone(adapted, requests, run_all(adapted.core(), requests, check=False))


@pytest.mark.parametrize("chunk", [16, 33, 100])
def test_chunks_preemption_and_a_warm_cache_change_no_bit(adapted: Adapted, chunk: int) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        if step % 3 == 2 and core.scheduler.running:
            core.scheduler.preempt_youngest()

    core = adapted.core(chunk_tokens=chunk, token_budget=200)
    run_all(core, mixed(17, shift=1))
    requests = mixed(17)
    assert_as_alone(adapted, requests, run_all(core, requests, before_step=preempt))
    assert core.metrics().prefix_cache_hits > 0


def test_a_request_without_an_adapter_has_the_bits_of_an_engine_that_knows_none(adapted: Adapted) -> None:
    outputs = run_all(adapted.core(), mixed(16), check=False)
    for index in range(0, 16, len(NAMES)):
        bare = run_all(model_core(adapted.model), [ask(index, None)])
        assert bits(outputs[str(index)]) == bits(bare[str(index)])


def test_one_prompt_is_answered_in_as_many_ways_as_there_are_adapters(adapted: Adapted) -> None:
    requests = [replace(ask(5, name), request_id=str(name), adapter=name) for name in NAMES]
    outputs = run_all(adapted.core(), requests)
    assert len({bits(output)[2] for output in outputs.values()}) == len(NAMES)
    read = [replace(request, pooling=Pooling.MEAN) for request in requests]
    assert len({output.embedding for output in run_all(adapted.core(), read).values()}) == len(NAMES)


def test_going_through_a_recorded_output_among_others_gives_its_bits(adapted: Adapted) -> None:
    requests = mixed(32)
    forced = []
    for index, request in enumerate(requests):
        tokens = alone(adapted, index, request.adapter)[0]
        assert isinstance(tokens, tuple)
        forced.append(replace(request, forced=tokens, cache_salt=b"%d" % index))
    assert_as_alone(adapted, requests, run_all(adapted.core(), forced, check=False))


# --- the engine whole ---


@pytest.fixture(scope="module")
def directories(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loaded")
    return {name: write_adapter(root / name, tiny_models["wide"], seed=seed) for seed, name in enumerate("ab")}


def settings(model: Path, **adapters: Path) -> EngineConfig:
    sizes = {"kv_cache_mib": 4, "max_sequences": 8, "max_tokens_per_step": 64}
    return EngineConfig(model, threads=1, adapters=tuple(adapters.items()), **sizes)


@pytest.fixture
async def engine(tiny_models: dict[str, Path], directories: dict[str, Path]) -> AsyncIterator[EngineRuntime]:
    threads = torch.get_num_threads()
    running = load_engine(settings(tiny_models["wide"], **directories))
    yield running
    running.close()
    torch.set_num_threads(threads)


async def test_an_answer_replays_with_its_adapter_and_with_no_other(engine: EngineRuntime) -> None:
    request = replace(ask(9, "a"), sampling=replace(ask(9, "a").sampling, max_tokens=24))
    deltas = [delta async for delta in engine.generate(request)]
    tokens, stats = [token for delta in deltas for token in delta.tokens], deltas[-1].stats
    assert stats is not None
    evidence = {"recorded_policy": engine.numeric_policy, "recorded_tokens": tokens}
    for again in (force, regenerate):
        verdict = await again(engine, replace(request, request_id="same"), stats.replay_digest, **evidence)
        assert verdict.outcome is ReplayOutcome.IDENTICAL
        for other in ("b", None):
            flipped = replace(request, request_id="other", adapter=other)
            verdict = await again(engine, flipped, stats.replay_digest, **evidence)
            assert verdict.outcome is ReplayOutcome.DIFFERENT
            assert verdict.first_difference is not None


async def test_an_adapter_that_is_not_loaded_is_that_request_s_refusal(engine: EngineRuntime) -> None:
    with pytest.raises(RequestRefused, match="`adapter`") as refused:
        async for _ in engine.generate(ask(1, "unheard of")):
            pass
    assert refused.value.param == "adapter"
    assert engine.health().alive


async def test_versions_are_of_the_model_alone_and_with_each_adapter(
    engine: EngineRuntime, tiny_models: dict[str, Path]
) -> None:
    assert engine.versions[engine.model.digest] == engine.model
    named = {version.adapter.name for version in engine.versions.values() if version.adapter is not None}
    assert (named, len(engine.versions)) == ({"a", "b"}, 3)
    bare = load_engine(settings(tiny_models["wide"]))
    bare.close()
    assert bare.model == engine.model
    assert bare.numeric_policy == engine.numeric_policy  # to load an adapter makes no old answer another one


def test_an_engine_does_not_start_with_an_adapter_that_is_refused(
    tiny_models: dict[str, Path], directories: dict[str, Path], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(directories["a"], tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter `second`: `adapter_model\.safetensors`"):
        load_engine(settings(tiny_models["wide"], first=directories["a"], second=damaged))
