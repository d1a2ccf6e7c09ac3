"""What governance costs: the gateway with everything on, against the bare engine behind the same HTTP layer.

    python -m tests.benchmarks.bench_gateway [--engine demo|scripted] [--shape half-billion] [--fsync-ms 1]
                                             [--requests 96] [--rounds 1]

Both servers run in processes of their own, in turn, with the load client in a third; TTFT, throughput and their ratios
at concurrency 1, 8 and 32, streamed. With several rounds each figure is the median of as many runs, and so is what is
added and the ratio, of the two runs of a round: a machine that others use as well is not as fast from one to the next.

Asked is what the demonstration model is measured by: one question for all would be answered from the cache, and always
begin with the same word. Answers are of a quarter to seven quarters of `--max-tokens`, drawn once: of one length, all
would end in the same step, and the next be asked together. `--shape` puts a model of random weights in the place of the
demonstration model, as bench_peers draws it. With the scripted engine, which answers at once, also what is asked of a
gateway alone: short answers in one piece, a second, and engine steps of long streamed answers, a second; steps that
wait together leave as one chunk. Also the governed server's resident memory. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import psutil

from gateway.demo.dialogues import held_out_dialogues
from tests.benchmarks.bench_demo_model import SEED
from tests.benchmarks.checkpoint import SHAPES, write_checkpoint
from tests.benchmarks.load import Load, run_load
from tests.benchmarks.machine import describe_machine
from tests.support.server import free_port
from tests.support.tenant import MODEL


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    token_file: str
    process: psutil.Process

    @property
    def resident_mib(self) -> float:
        return float(self.process.memory_info().rss) / (1 << 20)


@contextmanager
def served(kind: str, options: list[str]) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as directory:
        data, port = Path(directory) / "data", free_port()
        command = [sys.executable, "-m", "tests.benchmarks.measured_servers", kind, "--data", str(data)]
        process = subprocess.Popen([*command, "--port", str(port), *options])
        try:
            _wait_ready(f"http://127.0.0.1:{port}", process)
            yield Served(f"http://127.0.0.1:{port}", str(data / "app.jwt"), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("the server ended at its start")
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("demo", "scripted"), default="demo")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--fsync-ms", type=float, default=0.0, help="as on a slower disk than this one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        _measure(arguments, Path(directory))


def _measure(arguments: argparse.Namespace, directory: Path) -> None:
    print(describe_machine())
    disk = f"a disk whose fsync takes {arguments.fsync_ms:g} ms" if arguments.fsync_ms else "this disk"
    print(f"engine: {arguments.shape or arguments.engine}; {arguments.requests} streamed requests, "
          f"{arguments.max_tokens} tokens in the mean; {disk}; rounds: {arguments.rounds}")  # fmt: skip
    print(f"{'concurrency':>11} {'server':>9} {'ttft p50':>9} {'p99':>8} {'tokens/s':>9} {'chunks/s':>9} {'req/s':>7}")
    options = ["--engine", arguments.engine]
    if arguments.shape is not None:
        write_checkpoint(arguments.shape, directory / "model")
        options += ["--model", str(directory / "model")]
    workload = _draw_workload(directory / "workload", arguments.requests, arguments.max_tokens)
    with (
        served("bare", options) as bare,
        served("governed", [*options, "--fsync-ms", str(arguments.fsync_ms)]) as governed,
    ):
        for concurrency in (1, 8, 32):
            requests = arguments.requests if concurrency > 1 else max(8, arguments.requests // 4)
            loads: dict[str, list[Load]] = {"bare": [], "governed": []}
            for turn in range(arguments.rounds):
                for name, one in (("bare", bare), ("governed", governed))[:: -1 if turn % 2 else 1]:
                    load = run_load(one.url, one.token_file, MODEL, concurrency, requests, workload=workload)
                    loads[name].append(load)
            for name, measured in loads.items():
                print(_row(concurrency, name, measured))
            print(_comparison(loads["bare"], loads["governed"]))
        if arguments.engine == "scripted":
            _print_limits(bare, governed, arguments.requests, arguments.rounds)
        print(f"governed server: {governed.resident_mib:.0f} MiB resident; bare: {bare.resident_mib:.0f} MiB")


def _draw_workload(file: Path, requests: int, mean: int) -> Path:
    """Write what is asked, a line a request: the questions that the demonstration model is measured by."""
    rng = random.Random(5)
    dialogues = list(held_out_dialogues(SEED, requests))
    rng.shuffle(dialogues)
    asked = (
        {"text": dialogue.messages[-1]["content"], "max_tokens": rng.randint(-(-mean // 4), 7 * mean // 4)}
        for dialogue in dialogues[:requests]
    )
    file.write_text("".join(json.dumps(one) + "\n" for one in asked))
    return file


def _print_limits(bare: Served, governed: Served, requests: int, rounds: int) -> None:
    for name, one in (("bare", bare), ("governed", governed)):
        turns = range(rounds)
        short = [run_load(one.url, one.token_file, MODEL, 32, 4 * requests, 16, stream=False) for _ in turns]
        long = [run_load(one.url, one.token_file, MODEL, 32, requests, 448) for _ in turns]
        print(
            f"{name:>20}: {median(load.requests_per_s for load in short):.0f} answers of 16 tokens/s, not streamed; "
            f"{median(load.tokens_per_s for load in long):.0f} steps/s of streamed answers of 448 tokens"
        )


def _row(concurrency: int, name: str, loads: Sequence[Load]) -> str:
    errors = sum(load.errors for load in loads)
    return (
        f"{concurrency:>11} {name:>9} {median(load.ttft_p50_ms for load in loads):>6.2f} ms "
        f"{median(load.ttft_p99_ms for load in loads):>5.1f} ms {median(load.tokens_per_s for load in loads):>9.0f} "
        f"{median(load.chunks_per_s for load in loads):>9.0f} {median(load.requests_per_s for load in loads):>7.0f}"
        + (f"  {errors} errors" if errors else "")
    )


def _comparison(bare: Sequence[Load], governed: Sequence[Load]) -> str:
    pairs = list(zip(bare, governed, strict=True))
    added = [ours.ttft_p50_ms - theirs.ttft_p50_ms for theirs, ours in pairs]
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for theirs, ours in pairs]
    of_all = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
    return f"{'':>11} added TTFT p50 {median(added):+.2f} ms; throughput × {median(ratios):.3f}{of_all}"


if __name__ == "__main__":
    main()
