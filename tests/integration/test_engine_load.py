"""From a directory to an engine that answers: the whole of `load_engine`, a replay, and what it refuses to start on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, EngineStartError, UnsupportedModel
from engine.load import load_engine
from engine.reading import WeightsError
from engine.replay import ReplayOutcome, regenerate
from engine.request import FinishReason, GenerationRequest, SamplingParams, TokenDelta
from engine.runtime import EngineRuntime
from engine.weights import digest_directory


def settings(directory: Path) -> EngineConfig:
    return EngineConfig(directory, threads=1, kv_cache_mib=4, max_sequences=8, max_tokens_per_step=64)


@pytest.fixture(scope="module")
def engine(tiny_models: dict[str, Path]) -> Iterator[EngineRuntime]:
    threads = torch.get_num_threads()
    running = load_engine(settings(tiny_models["wide"]))
    yield running
    running.close()
    torch.set_num_threads(threads)


def ask(engine: EngineRuntime, name: str) -> GenerationRequest:
    # Twice as long as a step: its first chunk is computed alone and samples nothing.
    text = engine.render_chat([{"role": "user", "content": "Wie viel kostet ein Konto? " * 12}])
    prompt = tuple(engine.encode(text, chat=True))
    assert len(prompt) > 128
    sampling = SamplingParams(max_tokens=30, seed=11, temperature=0.8, top_p=0.95, logprobs=True, ignore_eos=True)
    return GenerationRequest(name, prompt, sampling, b"salt", "tenant")


async def answer(engine: EngineRuntime, request: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(request)]


async def test_an_answer_is_generated_and_repeated_bit_for_bit(engine: EngineRuntime) -> None:
    request = ask(engine, "first")
    deltas = await answer(engine, request)
    tokens = [token for delta in deltas for token in delta.tokens]
    stats = deltas[-1].stats
    assert stats is not None
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert "".join(delta.text for delta in deltas) == engine.decode(tokens)
    verdict = await regenerate(
        engine,
        replace(request, request_id="again"),
        stats.replay_digest,
        recorded_policy=engine.numeric_policy,
        recorded_tokens=tokens,
    )
    assert verdict.outcome is ReplayOutcome.IDENTICAL


async def test_the_first_difference_of_another_seed_is_named(engine: EngineRuntime) -> None:
    request = ask(engine, "seeded")
    deltas = await answer(engine, request)
    stats = deltas[-1].stats
    assert stats is not None
    other = replace(request, request_id="other", sampling=replace(request.sampling, seed=12))
    tokens = [token for delta in deltas for token in delta.tokens]
    verdict = await regenerate(
        engine, other, stats.replay_digest, recorded_policy=engine.numeric_policy, recorded_tokens=tokens
    )
    assert verdict.outcome is ReplayOutcome.DIFFERENT
    assert verdict.first_difference is not None


def test_the_model_version_is_that_of_the_directory(engine: EngineRuntime, tiny_models: dict[str, Path]) -> None:
    assert engine.model == digest_directory(tiny_models["wide"])
    assert engine.context_length == 1024


@pytest.mark.parametrize(
    ("damaged", "error"),
    [("model.safetensors", WeightsError), ("tokenizer.json", WeightsError), ("config.json", WeightsError)],
)
def test_a_damaged_directory_does_not_start_and_says_which_file(
    tiny_models: dict[str, Path], tmp_path: Path, damaged: str, error: type[EngineStartError]
) -> None:
    directory = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))
    (directory / damaged).write_bytes(b"{")
    with pytest.raises(error, match=damaged):
        load_engine(settings(directory))


def test_an_architecture_that_is_not_served_does_not_start(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))
    path = directory / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "FalconForCausalLM"))
    with pytest.raises(UnsupportedModel, match="`FalconForCausalLM`"):
        load_engine(settings(directory))


def test_a_small_model_leaves_a_cpu_to_the_gateway(tiny_models: dict[str, Path]) -> None:
    threads = torch.get_num_threads()
    try:
        load_engine(replace(settings(tiny_models["llama"]), threads=None)).close()
        assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) - 1)
    finally:
        torch.set_num_threads(threads)
