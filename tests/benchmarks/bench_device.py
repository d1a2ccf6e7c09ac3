"""Output tokens per second of the bare engine on a GPU: core and runner in one thread, random weights, no files.

    python -m tests.benchmarks.bench_device [--shape qwen3-0.6b] [--device cuda] [--sequences 1 256] [--prompt 1024]
        [--output 1024] [--kv-cache-gib 64]

Every request arrives at once, with a prompt of its own. Printed: how long start-up took to try products and attention
and to compile, and the figures over the whole run and over the steps that only decode. Asserts nothing, and was run in
Triton's interpreter alone so far (`--shape tiny --device cpu`, a few tokens).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from engine.core import EngineCore
from engine.device import ATTENTION, choose_attention, choose_products, open_device
from engine.device_runner import DeviceRunner
from engine.model_runner import blocks_in
from engine.models.decoder import Decoder, DecoderConfig, parameter_shapes
from engine.models.triton_arithmetic import TritonArithmetic
from tests.benchmarks.machine import describe_machine
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.device_engine import Sizes, config_of
from tests.support.engine_core import make_limits, make_request

SHAPES = {
    "tiny": Sizes(vocab=512, hidden=64, inner=128, layers=1, heads=4, groups=2, head=16),
    "qwen3-0.6b": Sizes(vocab=151_936, hidden=1024, inner=3072, layers=28, heads=16, groups=8, head=128),
    "qwen3-8b": Sizes(vocab=151_936, hidden=4096, inner=12_288, layers=36, heads=32, groups=8, head=128),
}
BUDGET = 8192  # tokens of a step


def draw_parameters(config: DecoderConfig, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).div_(shape[-1] ** 0.5)
        for name, shape in parameter_shapes(config).items()
    }


def start(config: DecoderConfig, device: torch.device, budget: int, gibibytes: int) -> DeviceRunner:
    begun = time.perf_counter()
    products = choose_products(config, budget, device)
    attention = choose_attention(config, device)
    tried = time.perf_counter()
    arithmetic = TritonArithmetic(device, products, ATTENTION[attention])
    decoder = Decoder(config, draw_parameters(config, device), arithmetic)
    runner = DeviceRunner(decoder, arithmetic, blocks_in(gibibytes << 10, config))
    drawn = time.perf_counter()
    runner.warm_up(budget)
    print(
        f"tried in {tried - begun:.1f} s, warmed up in {time.perf_counter() - drawn:.1f} s; {runner.block_count} blocks"
    )
    print(f"attention {attention}; products " + ", ".join(f"{n}x{k} {name}" for (n, k), name in products.items()))
    return runner


def measure(runner: DeviceRunner, config: DecoderConfig, sequences: int, prompt: int, output: int, budget: int) -> str:
    limits = make_limits(
        vocabulary_size=config.vocab_size,
        context_length=prompt + output + 1,
        max_sequences=sequences,
        waiting_limit=sequences,
        token_budget=budget,
        chunk_tokens=budget,
    )
    core = EngineCore(runner, limits, eos_ids=frozenset({EOS}), detokenizer_for=detokenizer_for)
    for index in range(sequences):
        tokens = [3 + (7919 * index + 31 * at) % (config.vocab_size - 3) for at in range(prompt)]
        core.add(make_request(str(index), tokens, output, seed=index, logprobs=False, ignore_eos=True))
    begun, decoding_s, decoded = time.perf_counter(), 0.0, 0
    while core.has_work:
        before, at = core.metrics(), time.perf_counter()
        core.step()
        after = core.metrics()
        made = after.generation_tokens - before.generation_tokens
        if after.computed_tokens - before.computed_tokens == made:
            decoding_s += time.perf_counter() - at
            decoded += made
    total = time.perf_counter() - begun
    step_ms = 1000 * decoding_s * sequences / max(1, decoded)
    whole = sequences * output / total
    return f"{sequences:>9} {whole:>14.0f} {decoded / decoding_s:>14.0f} {step_ms:>9.2f} {total:>9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="output tokens per second of the bare engine on a GPU")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--output", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--kv-cache-gib", type=int, default=64)
    chosen = parser.parse_args()
    device = open_device(chosen.device)
    config = config_of("qwen3", SHAPES[chosen.shape], positions=chosen.prompt + chosen.output + 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    print(f"machine: {name}; {describe_machine()}, torch {torch.__version__}")
    runner = start(config, device, chosen.budget, chosen.kv_cache_gib)
    print(f"{chosen.shape}, prompt {chosen.prompt} tokens, output {chosen.output}, temperature 1")
    print("sequences  out tok/s all  decode tok/s   step ms   total s")
    measure(runner, config, 2, min(20, chosen.prompt), 5, chosen.budget)
    for sequences in chosen.sequences:
        print(measure(runner, config, sequences, chosen.prompt, chosen.output, chosen.budget), flush=True)


if __name__ == "__main__":
    main()
