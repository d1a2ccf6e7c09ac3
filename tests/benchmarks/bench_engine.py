"""Output tokens per second of the bare engine: core and runner in one thread, no HTTP, no detokenizer's text wanted.

    python -m tests.benchmarks.bench_engine [MODEL_DIRECTORY] [--threads 2] [--prompt 220] [--output 100]

Without a directory it draws a Llama of 4 layers and 5 million parameters: speed does not depend on what weights say.
At each concurrency every request arrives at once, with a prompt of its own (no prefix is shared); the figures are over
the whole run, prefill included, and over the steps that only decode.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from engine.core import EngineCore
from engine.model_loading import load_model
from engine.model_runner import ModelRunner, blocks_in
from engine.models.model import Model
from engine.reading import Reading
from tests.benchmarks.checkpoint import write_checkpoint
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.engine_core import make_limits, make_request

BUDGET = 256  # tokens of a step, the default
CONCURRENCIES = (1, 8, 32)


def draw_model(directory: Path) -> Path:
    """Return a directory with the model that is measured where none is named."""
    write_checkpoint("tiny", directory)
    return directory


def load(directory: Path) -> tuple[Model, str]:
    loaded = load_model(Reading(directory), BUDGET)
    products = loaded.policy["linear"]
    assert isinstance(products, dict)
    named = ", ".join(f"{shape} {name}" for shape, name in products.items())
    return loaded.model, f"attention {loaded.policy['attention']}; products {named}"


def make_core(decoder: Model) -> EngineCore:
    config = decoder.config
    limits = make_limits(
        vocabulary_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        token_budget=BUDGET,
        chunk_tokens=BUDGET,
    )
    runner = ModelRunner(decoder, blocks_in(512, config))
    return EngineCore(runner, limits, eos_ids=frozenset({EOS}), detokenizer_for=detokenizer_for)


def measure(decoder: Model, concurrency: int, prompt: int, output: int) -> str:
    core = make_core(decoder)
    for index in range(concurrency):
        tokens = [3 + (7919 * index + 31 * at) % (decoder.config.vocab_size - 3) for at in range(prompt)]
        core.add(make_request(str(index), tokens, output, seed=index, logprobs=False, ignore_eos=True))
    begun, decoding_s, decoded = time.perf_counter(), 0.0, 0
    while core.has_work:
        before, start = core.metrics(), time.perf_counter()
        core.step()
        after = core.metrics()
        tokens_out = after.generation_tokens - before.generation_tokens
        if after.computed_tokens - before.computed_tokens == tokens_out:
            decoding_s += time.perf_counter() - start
            decoded += tokens_out
    total = time.perf_counter() - begun
    whole = concurrency * output / total
    return f"{concurrency:>11} {whole:>14.0f} {decoded / decoding_s:>14.0f} {total:>9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="output tokens per second of the bare engine")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=220)
    parser.add_argument("--output", type=int, default=100)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as temporary:
        decoder, products = load(chosen.model or draw_model(Path(temporary)))
    load_average = os.getloadavg()[0]
    print(f"machine: {platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}")
    print(f"torch {torch.__version__}, {chosen.threads} threads, load average before the run {load_average:.1f}")
    print(f"model: {decoder.config.num_hidden_layers} layers, vocabulary {decoder.config.vocab_size}; {products}")
    print(f"prompt {chosen.prompt} tokens, output {chosen.output}, temperature 1")
    print("concurrency  out tok/s all  decode tok/s   total s")
    measure(decoder, 1, 20, 5)
    for concurrency in CONCURRENCIES:
        print(measure(decoder, concurrency, chosen.prompt, chosen.output))


if __name__ == "__main__":
    main()
