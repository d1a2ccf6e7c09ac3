"""Output tokens per second beside other engines: one checkpoint, one set of requests, one run.

    python -m tests.benchmarks.bench_peers [--shape tiny|half-billion] [--rounds 3]

Ours is measured over HTTP with everything on: JWT, policy, guardrails, durable log. `transformers` is measured as it
generates in static batches, without a server: a batch ends with its longest answer. vLLM is measured where it is
installed. Lengths are drawn as chats have them, weights at random: speed does not depend on what they say. Asserts
nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.bench_gateway import served
from tests.benchmarks.load import run_load
from tests.benchmarks.machine import describe_machine
from tests.support.tenant import MODEL
from tests.support.tiny_models import SENTENCES, make_tokenizer

CONCURRENCIES = (1, 8, 32)
CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Asked:
    text: str
    output: int  # tokens


def write_checkpoint(shape: str, directory: Path) -> int:
    """Write a model of random weights; return its parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    common: dict[str, Any] = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "eos_token_id": 2}
    if shape == "tiny":
        config: Any = LlamaConfig(
            **common,
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    else:
        config = Qwen2Config(
            **common,
            vocab_size=32_768,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def draw_requests(count: int) -> list[Asked]:
    """Return requests of about 200 tokens in and 130 out, each its own text."""
    rng = random.Random(3)
    requests = []
    for number in range(count):
        characters = int(min(max(rng.lognormvariate(5.6, 0.8), 40), 1600))
        text = f"{number}: " + " ".join(rng.choice(SENTENCES) for _ in range(1 + characters // 40))
        requests.append(Asked(text[:characters], int(min(max(rng.lognormvariate(4.7, 0.6), 16), 320))))
    return requests


def ours(directory: Path, requests: list[Asked], concurrency: int) -> float:
    """Return output tokens a second of the gateway."""
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.jsonl"
        lines = (json.dumps({"text": one.text, "max_tokens": one.output}) for one in requests)
        workload.write_text("\n".join(lines))
        with served("governed", ["--model", str(directory)]) as one:
            load = run_load(one.url, one.token_file, MODEL, concurrency, len(requests), workload=workload)
    if load.errors:
        raise SystemExit(f"{load.errors} requests failed")
    return load.tokens_per_s


@torch.inference_mode()
def transformers_static(directory: Path, requests: list[Asked], concurrency: int) -> float:
    """Return useful output tokens a second of `transformers` in batches of `concurrency`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer: Any = make_tokenizer()
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
    parser.add_argument("--shape", choices=("tiny", "half-billion"), default="tiny")
    parser.add_argument("--rounds", type=int, default=2, help="requests for each that is asked at once")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{describe_machine()}; torch {torch.__version__}, 2 threads")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        parameters = write_checkpoint(arguments.shape, directory)
        print(f"{arguments.shape}: {parameters / 1e6:.0f} M parameters, bfloat16; output tokens/s")
        print(f"{'at once':>8} {'ours, over HTTP, governed':>26} {'transformers, static':>21} {'ours ÷ it':>10}")
        for concurrency in CONCURRENCIES:
            requests = draw_requests(max(6, arguments.rounds * concurrency))
            mine = ours(directory, requests, concurrency)
            theirs = transformers_static(directory, requests, concurrency)
            print(f"{concurrency:>8} {mine:>26.0f} {theirs:>21.0f} {mine / theirs:>10.2f}", flush=True)
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: it was not measured")


if __name__ == "__main__":
    main()
