"""The products that the engine may choose among on a CPU: microseconds, and whether a row keeps its bits, by shape.

    python -m tests.benchmarks.bench_linear [--threads 1]

The shapes are those of the two checkpoints of bench_peers. Each figure is the best of several calls on one weight,
which a cache may hold: a model's weights come from memory, and the difference is then less. Asserts nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from engine.model_runner import products_here
from kernels.linear import verify_invariance
from tests.benchmarks.machine import describe_machine

ROWS = (1, 2, 8, 32, 128, 512)
SHAPES = ((512, 256), (256, 256), (1376, 256), (256, 688), (8192, 256))
SHAPES += ((1152, 896), (896, 896), (9728, 896), (896, 4864), (32_768, 896))
REPEATS = 30


def microseconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return 1e6 * best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print(f"{describe_machine()}; torch {torch.__version__}, {threads} threads")
    print(f"{'N x K':>12} {'product':>16} {'invariant':>10}  microseconds at {', '.join(map(str, ROWS))} rows")
    for shape in SHAPES:
        weight = torch.randn(shape).bfloat16()
        inputs = [torch.randn(rows, shape[1]).bfloat16() for rows in ROWS]
        for name, product in products_here().items():
            kept = verify_invariance(product.multiply, shape, torch.bfloat16, 512, pack=product.pack)
            packed, multiply = product.pack(weight), product.multiply
            figures = [microseconds(lambda: multiply(x, packed, None)) for x in inputs]  # noqa: B023 - called at once
            shown = " ".join(f"{figure:>7.0f}" for figure in figures)
            print(f"{shape[0]:>6} x{shape[1]:>4} {name:>16} {'yes' if kept else 'no':>10} {shown}", flush=True)


if __name__ == "__main__":
    main()
