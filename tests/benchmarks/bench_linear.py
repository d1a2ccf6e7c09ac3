"""The products that the engine may choose among on a CPU: microseconds, and whether a row keeps its bits, by shape.

    python -m tests.benchmarks.bench_linear [--threads 1] [--mib 64]

The shapes are those of the two checkpoints of bench_peers. Every product has weights of its own, so many MiB, and they
are multiplied in turns: a call meets one that was read long ago, since a model's weights come from memory, too. Each
figure is the median of several rounds; with one thread it is the time of the thread, for others may have the machine as
well. Asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engine.model_runner import Product, products_here
from kernels.linear import verify_invariance
from tests.benchmarks.machine import describe_machine

ROWS = (1, 2, 8, 32, 128, 512)
SHAPES = ((512, 256), (256, 256), (1376, 256), (256, 688), (8192, 256))
SHAPES += ((1152, 896), (896, 896), (9728, 896), (896, 4864), (32_768, 896))
ROUNDS = 5
SAMPLE = 1e10  # multiplications of a round, about: of many rows by many weights not all are done


def microseconds(
    products: Mapping[str, Product],
    packed: Mapping[str, Sequence[Tensor]],  # weights of one shape, as many for every product
    shape: tuple[int, int],
    rows: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Return what a call takes, by the name of the product."""
    x = torch.randn(rows, shape[1]).bfloat16()
    count = min(map(len, packed.values()))
    calls = max(3, min(count, int(SAMPLE / (rows * shape[0] * shape[1]))))
    taken: dict[str, list[float]] = {name: [] for name in products}
    for start in range(ROUNDS):
        for name, product in products.items():
            begun = clock()
            for index in range(calls):
                product.multiply(x, packed[name][(start * calls + index) % count], None)
            taken[name].append((clock() - begun) / calls)
    return {name: 1e6 * statistics.median(figures) for name, figures in taken.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mib", type=int, default=64)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    clock = time.thread_time if chosen.threads == 1 else time.perf_counter
    print(f"{describe_machine()}; torch {torch.__version__}, {chosen.threads} threads")
    print(f"{'N x K':>12} {'product':>16} {'invariant':>10}  microseconds at {', '.join(map(str, ROWS))} rows")
    products = products_here()
    for shape in SHAPES:
        count = max(2, (chosen.mib << 20) // (2 * shape[0] * shape[1]))
        weights = [torch.randn(shape).bfloat16() for _ in range(count)]
        packed = {name: [product.pack(weight) for weight in weights] for name, product in products.items()}
        figures = [microseconds(products, packed, shape, rows, clock) for rows in ROWS]
        for name, product in products.items():
            kept = verify_invariance(product.multiply, shape, torch.bfloat16, 512, pack=product.pack)
            shown = " ".join(f"{one[name]:>7.0f}" for one in figures)
            print(f"{shape[0]:>6} x{shape[1]:>4} {name:>16} {'yes' if kept else 'no':>10} {shown}", flush=True)


if __name__ == "__main__":
    main()
