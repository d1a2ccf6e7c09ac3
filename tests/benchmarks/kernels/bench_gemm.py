"""The product at the shapes of Qwen3 0.6B and 8B: first whose bits agree, then how fast each is.

    python -m tests.benchmarks.kernels.bench_gemm

Bits: rows of the widest product by the library, split K forbidden, against the same rows by our kernel at every tile of
the table, and by the library at fewer rows. What differs is printed by name; it decides the design. Time: our kernel
against `F.linear` with split K forbidden, at one to 2,048 rows; the library left to itself needs a process of its own
(`--free`), since it reads its settings once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm import gemm, gemm_silu_mul
from kernels.launch import TABLE
from kernels.linear import forbid_split_k
from kernels.silu_mul import silu_mul
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

SHAPES = {  # (N, K) of qkv, o, gate·up, down
    "Qwen3 0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "Qwen3 8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
}
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
MOST = 2048


def draw(rows: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    width, depth = shape
    return torch.randn(rows, depth, device="cuda").bfloat16(), torch.randn(width, depth, device="cuda").bfloat16()


def classes(shape: tuple[int, int]) -> Iterator[tuple[str, Tensor, int]]:
    """Yield a product of the same rows by name, each way, and how many rows it has."""
    x, weight = draw(MOST, shape)
    yield f"library, {MOST} rows", F.linear(x, weight), MOST
    for rows in ROWS[:-1]:
        yield f"library, {rows} rows", F.linear(x[:rows], weight), rows
    for entry in TABLE:
        if entry.operation == "gemm":
            for rows in (1, 17, MOST):
                yield (
                    f"ours, tiles of {entry.launch.block_m}, {rows} rows",
                    gemm(x[:rows], weight, None, entry.launch),
                    rows,
                )


def compare_bits(shape: tuple[int, int]) -> None:
    ways = list(classes(shape))
    widest = ways[0][1]
    for name, result, rows in ways[1:]:
        other = int((result != widest[:rows]).sum())
        if other:
            print(f"  {name}: {other} of {result.numel()} elements are not those of {ways[0][0]}")
    ours = [result for name, result, rows in ways if name.startswith("ours") and rows == MOST]
    print(f"  our tiles among themselves: {'alike' if all(torch.equal(one, ours[0]) for one in ours) else 'DIFFERENT'}")


def compare_times(shape: tuple[int, int], ceilings: Ceilings) -> None:
    width, depth = shape
    for rows in ROWS:
        x, weight = draw(rows, shape)
        moved, operations = 2 * (rows * depth + width * depth + rows * width), 2 * rows * width * depth
        for name, call in (("library", lambda: F.linear(x, weight)), ("ours", lambda: gemm(x, weight))):  # noqa: B023 - called at once
            print("  " + ceilings.line(f"{rows} rows, {name}", seconds_of(call), moved, operations))


def compare_gate(shape: tuple[int, int], ceilings: Ceilings) -> None:
    width, depth = shape
    for rows in (1, 16, 64):
        x, weight = draw(rows, shape)
        moved = 2 * (rows * depth + width * depth + rows * width // 2)
        for name, call in (
            ("gate afterwards", lambda: silu_mul(gemm(x, weight))),  # noqa: B023 - called at once
            ("gate on the way out", lambda: gemm_silu_mul(x, weight)),  # noqa: B023 - called at once
        ):
            print("  " + ceilings.line(f"{rows} rows, {name}", seconds_of(call), moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--free", action="store_true", help="leave the library to itself")
    if not parser.parse_args().free:
        forbid_split_k()
    ceilings = measure()
    for model, shapes in SHAPES.items():
        for shape in shapes:
            print(f"{model}, N = {shape[0]}, K = {shape[1]}", flush=True)
            compare_bits(shape)
            compare_times(shape, ceilings)
        compare_gate(shapes[2], ceilings)


if __name__ == "__main__":
    main()
