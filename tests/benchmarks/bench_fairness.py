"""What a tenant's flood does to another tenant's time to first token.

    python -m tests.benchmarks.bench_fairness [--shape half-billion] [--flood 128] [--asked 100] [--sequences 16]

The bare engine on a model of bench_peers. One key keeps `--flood` requests (200 tokens in, 60 out) in the queue;
another asks now and then (4 tokens out), at any moment of a step, and its time to first token is taken: alone and
beside the flood, a part of the questions by turns, since no machine is as fast from one second to the next, and once as
it would be in plain order of arrival, which is the same flood under the same key. What is left of the flood is what of
a step does not give way when a question comes. Asserts nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.core import EngineCore
from engine.model_runner import ModelRunner, blocks_in
from engine.models.model import Model
from engine.request import GenerationRequest
from tests.benchmarks.bench_engine import BUDGET, load
from tests.benchmarks.checkpoint import SHAPES, write_checkpoint
from tests.benchmarks.machine import describe_machine
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.engine_core import make_limits, make_request

PAUSE_STEPS = 5  # between an answer and the next question
TURNS = 5


def make_core(decoder: Model, sequences: int, flood: int, budget: int) -> EngineCore:
    config = decoder.config
    limits = make_limits(
        vocabulary_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        max_sequences=sequences,
        token_budget=budget,
        chunk_tokens=budget,
        waiting_limit=flood + 8,
        key_limit=flood + 16,
    )
    runner = ModelRunner(decoder, blocks_in(512, config))
    return EngineCore(runner, limits, eos_ids=frozenset({EOS}), detokenizer_for=detokenizer_for)


def question(name: str, key: str, start: int, length: int, output: int) -> GenerationRequest:
    prompt = [3 + (7919 * start + 31 * at) % 8000 for at in range(length)]
    request = make_request(name, prompt, output, seed=start, temperature=0.0, logprobs=False, ignore_eos=True)
    return replace(request, fairness_key=key)


def first_tokens(
    decoder: Model,
    sequences: int,
    flood: int,
    asked: int,
    prompt: int,
    budget: int,
    flood_key: str = "flood",
    turn: int = 0,
) -> list[float]:
    """Return the times to first token, in seconds, of `asked` questions of the key `quiet`."""
    core, numbers, moments = make_core(decoder, sequences, flood, budget), itertools.count(), random.Random(turn)
    times: list[float] = []
    waiting_since, pause, lasted, due = 0.0, 4 * PAUSE_STEPS, 0.0, math.inf
    flooding = 0

    def ask_when_due() -> None:
        nonlocal waiting_since, due
        if time.perf_counter() >= due:
            waiting_since, due = due, math.inf
            core.add(question(f"quiet-{next(numbers)}", "quiet", next(numbers), prompt, 4))

    while len(times) < asked:
        while flooding < flood:
            core.add(question(f"flood-{next(numbers)}", flood_key, next(numbers), 200, 60))
            flooding += 1
        pause -= 1
        began = time.perf_counter()
        if pause == 0:  # it comes at any moment of the step under way
            due = began + moments.random() * lasted
        emissions = core.step(ask_when_due)
        lasted = time.perf_counter() - began
        if due <= began + lasted or (due < math.inf and not core.has_work):
            due = min(due, time.perf_counter())
            ask_when_due()
        for emission in emissions:
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
    late = milliseconds[int(0.99 * len(milliseconds))]
    return f"{name:>28} p50 {statistics.median(milliseconds):>8.1f} ms   p99 {late:>8.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--flood", type=int, default=128)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{describe_machine()}; torch {torch.__version__}, 2 threads; {arguments.shape}")
    print(f"{arguments.sequences} sequences run at once; {arguments.flood} requests of the flood always in flight")
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(arguments.shape, Path(directory))
        decoder, _ = load(Path(directory))
        for budget in (BUDGET, BUDGET // 4):
            for prompt in (60, 400):
                print(f"\n{prompt} tokens asked, at most {budget} a step")
                common = {"asked": -(-arguments.asked // TURNS), "prompt": prompt, "budget": budget}
                alone: list[float] = []
                beside: list[float] = []
                for turn in range(TURNS):
                    alone += first_tokens(decoder, arguments.sequences, 0, **common, turn=turn)
                    beside += first_tokens(decoder, arguments.sequences, arguments.flood, **common, turn=turn)
                print(row("alone", alone))
                print(row("beside a flood", beside))
        common = {"asked": 5, "prompt": 60, "budget": BUDGET}
        late = first_tokens(decoder, arguments.sequences, arguments.flood, **common, flood_key="quiet")
        print(f"\n{row('in order of arrival', late)}")


if __name__ == "__main__":
    main()
