"""What a replay costs: generating an answer again, against going through it in one pass.

    python -m tests.benchmarks.bench_replay [MODEL_DIRECTORY] [--threads 2] [--prompt 300] [--output 300]

Without a directory it draws the model of bench_engine. One answer at a time, and 16 at once; every verdict is looked
at, and printed if it is not `identical`. Asserts nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.models.decoder import Decoder
from engine.request import GenerationRequest
from tests.benchmarks.bench_engine import draw_model, load, make_core
from tests.benchmarks.machine import describe_machine
from tests.support.engine_core import Output, make_request, run_all

AT_ONCE = (1, 16)


def timed(decoder: Decoder, requests: Sequence[GenerationRequest]) -> tuple[float, dict[str, Output]]:
    """Return the seconds that a fresh engine takes for all of them, and what came out."""
    core = make_core(decoder)
    start = time.perf_counter()
    outputs = run_all(core, requests, check=False)
    return time.perf_counter() - start, outputs


def measure(decoder: Decoder, count: int, prompt: int, output: int) -> None:
    requests = []
    for index in range(count):
        tokens = [3 + (7919 * index + 31 * at) % (decoder.config.vocab_size - 3) for at in range(prompt)]
        requests.append(make_request(str(index), tokens, output, seed=index, logprobs=False, ignore_eos=True))
    timed(decoder, requests[:1])  # not counted
    again, recorded = timed(decoder, requests)
    forced, gone_through = timed(
        decoder, [replace(one, forced=tuple(recorded[one.request_id].tokens)) for one in requests]
    )
    print(
        f"{count:>8} {again * 1e3 / count:>17.1f} ms {forced * 1e3 / count:>15.1f} ms {again / forced:>8.1f} ×"
        f" {count / forced:>13.1f}"
    )
    for name, one in recorded.items():
        other = gone_through[name]
        if one.stats is None or other.stats is None or one.stats.replay_digest != other.stats.replay_digest:
            print(f"answer {name} is not identical")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--output", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{describe_machine()}; torch {torch.__version__}, {arguments.threads} threads")
    with tempfile.TemporaryDirectory() as directory:
        decoder, chosen = load(arguments.model or draw_model(Path(directory)))
        print(f"{arguments.prompt} tokens in, {arguments.output} out; {chosen}")
        print(f"{'at once':>8} {'generate, each':>20} {'forced, each':>18} {'faster':>10} {'replays/s':>13}")
        for count in AT_ONCE:
            measure(decoder, count, arguments.prompt, arguments.output)


if __name__ == "__main__":
    main()
