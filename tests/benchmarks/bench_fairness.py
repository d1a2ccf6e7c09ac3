"""What a tenant's flood does to another tenant's time to first token.

    python -m tests.benchmarks.bench_fairness [--flood 128] [--asked 20] [--sequences 16]

The bare engine on the model of bench_engine. One key keeps `--flood` requests (200 tokens in, 60 out) in the queue;
another asks now and then (60 in, 4 out), and its time to first token is taken: alone, beside the flood, and as it would
be in plain order of arrival, which is the same flood under the same key. Asserts nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.core import EngineCore
from engine.model_runner import ModelRunner, blocks_in
from engine.models.decoder import Decoder
from engine.request import GenerationRequest
from tests.benchmarks.bench_engine import BUDGET, draw_model, load
from tests.benchmarks.machine import describe_machine
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.engine_core import make_limits, make_request

PAUSE_STEPS = 5  # between an answer and the next question


def make_core(decoder: Decoder, sequences: int, flood: int) -> EngineCore:
    config = decoder.config
    limits = make_limits(
        vocabulary_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        max_sequences=sequences,
        token_budget=BUDGET,
        chunk_tokens=BUDGET,
        waiting_limit=flood + 8,
        key_limit=flood + 16,
    )
    runner = ModelRunner(decoder, blocks_in(512, config))
    return EngineCore(runner, limits, eos_ids=frozenset({EOS}), detokenizer_for=detokenizer_for)


def question(name: str, key: str, start: int, length: int, output: int) -> GenerationRequest:
    prompt = [3 + (7919 * start + 31 * at) % 8000 for at in range(length)]
    request = make_request(name, prompt, output, seed=start, temperature=0.0, logprobs=False, ignore_eos=True)
    return replace(request, fairness_key=key)


def first_tokens(decoder: Decoder, sequences: int, flood: int, flood_key: str, asked: int) -> list[float]:
    """Return the times to first token, in seconds, of `asked` questions of the key `quiet`."""
    core, numbers = make_core(decoder, sequences, flood), itertools.count()
    times: list[float] = []
    waiting_since, pause = 0.0, 4 * PAUSE_STEPS
    flooding = 0
    while len(times) < asked:
        while flooding < flood:
            core.add(question(f"flood-{next(numbers)}", flood_key, next(numbers), 200, 60))
            flooding += 1
        if pause == 0:
            core.add(question(f"quiet-{next(numbers)}", "quiet", next(numbers), 60, 4))
            waiting_since = time.perf_counter()
        pause -= 1
        for emission in core.step():
            if emission.request_id.startswith("flood"):
                flooding -= emission.delta.finish_reason is not None
                continue
            if waiting_since:
                times.append(time.perf_counter() - waiting_since)
                waiting_since = 0.0
            if emission.delta.finish_reason is not None:
                pause = PAUSE_STEPS
    return times


def row(name: str, times: list[float]) -> str:
    milliseconds = sorted(1e3 * one for one in times)
    return f"{name:>28} p50 {statistics.median(milliseconds):>8.1f} ms   worst {milliseconds[-1]:>8.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flood", type=int, default=128)
    parser.add_argument("--asked", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{describe_machine()}; torch {torch.__version__}, 2 threads")
    print(f"{arguments.sequences} sequences run at once; {arguments.flood} requests of the flood always in flight")
    with tempfile.TemporaryDirectory() as directory:
        decoder, _ = load(draw_model(Path(directory)))
        print(row("alone", first_tokens(decoder, arguments.sequences, 0, "flood", arguments.asked)))
        for name, key in (("beside a flood", "flood"), ("in order of arrival", "quiet")):
            print(row(name, first_tokens(decoder, arguments.sequences, arguments.flood, key, arguments.asked)))


if __name__ == "__main__":
    main()
