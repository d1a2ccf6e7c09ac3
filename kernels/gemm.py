"""The product x·Wᵀ in Triton, for few rows: bound by reading the weights, which happens once. Bias, or SiLU · up, on
the way out.

Numeric contract: row m of the result depends on row m of `x` and the weight alone. K is walked in ascending order into
one float32 accumulator: never split among programs, and in steps of the same depth for every number of rows. A table
says how many rows and columns a program takes; neither stands in the sum of an element. Then the bias is added, in
float32, and the result rounded once. `gemm_silu_mul` rounds gate and up before it multiplies them, so that it equals
`silu_mul(gemm(x, gate_up))` to the bit.

What this rests on and no interpreter can show: that the matrix units of a GPU add up an element alike for every tile,
`mma.sync` (16 rows) like `wgmma` (64 and more), and like the library's. `verify_invariance` of linear.py compares them
byte for byte on the machine; tests/benchmarks/kernels/bench_gemm.py prints which of them agree. It has not been run on
a GPU yet. Where they do not agree there is `gemm_one_tile`: every program takes as many rows and columns as every
other, however many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import INTERPRETED, Block, Pointer, jit, narrow, product, tl
from kernels.launch import Launch, device_of, launch_for, power_of_two
from kernels.shape import ShapeError, check_product
from kernels.silu_mul import gated, silu_mul_reference

LEAST_BLOCK_N = 16  # columns
PROGRAMS = 128  # blocks of columns are halved until there are as many: a Hopper has 132 multiprocessors


def gemm(
    x: Tensor,  # [M, K]  bfloat16 or float16, M ≥ 1
    weight: Tensor,  # [N, K]  same dtype
    bias: Tensor | None = None,  # [N]
    launch: Launch | None = None,  # None: what the table says for M rows
) -> Tensor:  # [M, N]
    """Return x·weightᵀ + bias, on a GPU or in the interpreter.

    Raises:
        ShapeError: an argument disagrees with the shapes above.

    Cost: the weights once for every tile of rows; up to 64 rows bound by memory bandwidth.
    """
    _check(x, weight, bias)
    return _launch(x, weight, bias, weight.shape[0], False, launch)


def gemm_silu_mul(
    x: Tensor,  # [M, K]  bfloat16 or float16, M ≥ 1
    gate_up: Tensor,  # [2I, K]  same dtype; gate, then up
    launch: Launch | None = None,
) -> Tensor:  # [M, I]
    """Return silu(x·gateᵀ) · (x·upᵀ), on a GPU or in the interpreter.

    Raises:
        ShapeError: an argument disagrees with the shapes above.
    """
    _check(x, gate_up)
    if gate_up.shape[0] % 2:
        raise ShapeError(f"`gate_up` has shape {list(gate_up.shape)}, not [2I, K]")
    return _launch(x, gate_up, None, gate_up.shape[0] // 2, True, launch)


def gemm_one_tile(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `gemm` by tiles of one size: a row's bits are the same by construction. Slow for many rows."""
    return gemm(x, weight, bias, launch_for("gemm_one_tile", x.shape[0], device_of(x)))


def gemm_silu_mul_one_tile(x: Tensor, gate_up: Tensor) -> Tensor:
    """Return `gemm_silu_mul` likewise."""
    return gemm_silu_mul(x, gate_up, launch_for("gemm_one_tile", x.shape[0], device_of(x)))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raise ShapeError unless the shapes agree and both are of one 16-bit dtype."""
    check_product(x, weight, bias)
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise ShapeError(f"`x` and `weight` are {x.dtype} and {weight.dtype}, not both bfloat16 or both float16")


def columns_of(launch: Launch, width: int, row_tiles: int, silu: bool = False) -> int:
    """Return how many columns a program takes: half where each is made of two, of gate and up, and fewer than the table
    says where the GPU would stand half empty."""
    block = max(LEAST_BLOCK_N, launch.block_n // 2) if silu else launch.block_n
    while block > LEAST_BLOCK_N and row_tiles * -(-width // block) < PROGRAMS:
        block //= 2
    return block


def step_of(launch: Launch, depth: int) -> int:
    """Return the depth of a step: what the table says, and for a short K no more than holds it."""
    return min(launch.block_k, power_of_two(depth))


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, width: int, silu: bool, launch: Launch | None) -> Tensor:
    rows, depth = x.shape
    launch = launch or launch_for("gemm", rows, device_of(x))
    row_tiles = -(-rows // launch.block_m)
    block_n = columns_of(launch, width, row_tiles, silu)
    out = x.new_empty(rows, width)
    _gemm_kernel[(row_tiles * -(-width // block_n),)](
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        rows,
        WIDTH=width,
        DEPTH=depth,
        SILU=silu,
        BLOCK_M=launch.block_m,
        BLOCK_N=block_n,
        BLOCK_K=step_of(launch, depth),
        PLAIN=INTERPRETED,
        **launch.options,
    )
    return out


@jit
def _gemm_kernel(
    x: Pointer,  # [rows, DEPTH]
    weight: Pointer,  # [WIDTH, DEPTH]; SILU: [2 · WIDTH, DEPTH]
    bias: Pointer,  # [WIDTH], or None
    out: Pointer,  # [rows, WIDTH]
    rows: int,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    row_tiles = tl.cdiv(rows, BLOCK_M)  # neighbours share a tile of weights, which is the larger
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    result = tile_product(x, weight, bias, row, row < rows, column, WIDTH, DEPTH, SILU, BLOCK_K, PLAIN)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    tl.store(out + row[:, None] * WIDTH + column[None, :], result, mask=inside)


@jit
def tile_product(
    x: Pointer,  # [·, DEPTH]
    weight: Pointer,  # [WIDTH, DEPTH]; SILU: [2 · WIDTH, DEPTH]
    bias: Pointer,  # [WIDTH], or None
    row: Block,  # [BLOCK_M] int64, of x
    present: Block,  # [BLOCK_M] bool; other rows are not read
    column: Block,  # [BLOCK_N] int64, of the result
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLAIN: tl.constexpr,
) -> Block:
    """Return a tile [BLOCK_M, BLOCK_N] of the result, in the dtype of x."""
    dtype: tl.constexpr = x.dtype.element_ty
    step = tl.arange(0, BLOCK_K)
    left = x + row[:, None] * DEPTH + step[None, :]
    right = weight + column[None, :] * DEPTH + step[:, None]
    valid = (column < WIDTH)[None, :]
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    total_up = total
    for start in range(0, DEPTH, BLOCK_K):
        of_left, of_right = present[:, None], valid
        if DEPTH % BLOCK_K != 0:
            of_left = of_left & (start + step < DEPTH)[None, :]
            of_right = of_right & (start + step < DEPTH)[:, None]
        tile = tl.load(left + start, mask=of_left, other=0.0)
        total = product(tile, tl.load(right + start, mask=of_right, other=0.0), total, PLAIN)
        if SILU:
            up = tl.load(right + WIDTH * DEPTH + start, mask=of_right, other=0.0)
            total_up = product(tile, up, total_up, PLAIN)
    if bias is not None:
        total += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if SILU:
        gate = narrow(total, dtype, PLAIN).to(tl.float32)
        return gated(gate, narrow(total_up, dtype, PLAIN).to(tl.float32), dtype, PLAIN)
    return narrow(total, dtype, PLAIN)


def gemm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same in float64, rounded once."""
    result = x.double() @ weight.double().T
    return (result if bias is None else result + bias.double()).to(x.dtype)


def gemm_silu_mul_reference(x: Tensor, gate_up: Tensor) -> Tensor:
    """Return the same in float64, rounded where the definition rounds."""
    return silu_mul_reference(gemm_reference(x, gate_up))
