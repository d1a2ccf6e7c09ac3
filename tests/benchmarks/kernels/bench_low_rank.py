"""Adapters at the shapes of Qwen3 8B: what they add to a decode step, beside the product they add to.

    python -m tests.benchmarks.kernels.bench_low_rank

Rows are shared out evenly among the adapters. The bytes counted are A and B of every adapter, x, and the product read
and written.
"""

from __future__ import annotations

import torch

from kernels.gemm import gemm
from kernels.grouped import group_rows
from kernels.low_rank import LowRank, add_low_rank, add_low_rank_batch, stack_low_rank
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

SHAPES = ((6144, 4096), (24576, 4096), (4096, 12288))  # (N, K) of qkv, gate·up, down
RANK = 16


def compare(width: int, depth: int, rows: int, count: int, ceilings: Ceilings) -> None:
    x, product = torch.randn(rows, depth, device="cuda").bfloat16(), torch.randn(rows, width, device="cuda").bfloat16()
    adapters = [
        LowRank(
            torch.randn(RANK, depth, device="cuda").bfloat16() / depth**0.5,
            torch.randn(width, RANK, device="cuda").bfloat16(),
        )
        for _ in range(count)
    ]
    stack, of = stack_low_rank(adapters), torch.arange(rows, device="cuda") % count
    groups = group_rows(of, count)
    chosen = [(of == index).nonzero().squeeze(1) for index in range(min(rows, count))]

    def one_by_one() -> None:
        for index, own in enumerate(chosen):
            add_low_rank(product, x, own, adapters[index])

    moved = 2 * (min(rows, count) * RANK * (width + depth) + rows * (depth + 2 * width + 2 * RANK))
    batched = seconds_of(lambda: add_low_rank_batch(product, x, groups, stack))
    print(ceilings.line(f"  {rows} rows, {count} adapters", batched, moved))
    print(ceilings.line(f"  {rows} rows, {count} adapters, torch one by one", seconds_of(one_by_one), moved))


def main() -> None:
    ceilings = measure()
    for width, depth in SHAPES:
        print(f"N = {width}, K = {depth}, rank {RANK}", flush=True)
        for rows in (1, 64, 256):
            x, weight = (torch.randn(size, depth, device="cuda").bfloat16() for size in (rows, width))
            moved = 2 * (rows * (depth + width) + width * depth)
            taken = seconds_of(lambda: gemm(x, weight))  # noqa: B023 - called at once
            print(ceilings.line(f"  {rows} rows, the product itself", taken, moved))
            for count in (1, 8, 32):
                compare(width, depth, rows, count, ceilings)


if __name__ == "__main__":
    main()
