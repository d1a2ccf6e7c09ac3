"""Rows of one batch, each multiplied by the matrix of its group: adapters, experts.

A group's rows need not lie together; `order` names them group by group. A program takes a tile of rows of one group and
finds out itself whose it is, so that nothing is asked of the host: the grid is the most tiles that there can be, and
those beyond the last do nothing.

Numeric contract: that of gemm.py, by the same arithmetic: a row's bits depend on it and its group's matrix alone, and
equal what `gemm` gives for them. Source: Gale et al., MLSys 2023 (MegaBlocks); Chen et al., MLSys 2024 (Punica).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gemm import columns_of, step_of, tile_product
from kernels.jit import INTERPRETED, Block, Pointer, jit, narrow, tl
from kernels.launch import device_of, launch_for, power_of_two
from kernels.linear import linear_fixed_tiles
from kernels.shape import ShapeError, check_layout, check_shape
from kernels.silu_mul import silu_mul

MOST_GROUPS = 1024


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong to which of G groups."""

    order: Tensor  # [P] int64, no row twice: those of group 0, of group 1, …
    starts: Tensor  # [G + 1] int32, ascending from 0 to P or less: group g is order[starts[g] : starts[g + 1]]

    @property
    def count(self) -> int:
        return self.starts.shape[0] - 1


def group_rows(
    group_of: Tensor,  # [P] int64, 0 … `count` − 1 each, or `count`: of none
    count: int,  # G
) -> Groups:
    """Return the groups of rows. Within a group rows ascend; those of none come last.

    Cost: G + 1 programs, each of which reads `group_of` twice.
    """
    if group_of.is_cuda:
        return group_rows_triton(group_of, count)
    ordered, order = torch.sort(group_of, stable=True)
    bounds = torch.arange(count + 1, dtype=group_of.dtype, device=group_of.device)
    return Groups(order, torch.searchsorted(ordered, bounds, out_int32=True))


def group_rows_triton(group_of: Tensor, count: int) -> Groups:
    """Return `group_rows` by the kernel."""
    order = torch.empty_like(group_of, memory_format=torch.contiguous_format)
    starts = torch.empty(count + 1, dtype=torch.int32, device=group_of.device)
    launch = launch_for("grouped", count, device_of(group_of))
    rows = group_of.shape[0]
    _group_kernel[(count + 1,)](group_of.contiguous(), order, starts, rows, BLOCK=launch.block_n, **launch.options)
    return Groups(order, starts)


@jit
def _group_kernel(
    group_of: Pointer,  # [rows] int64
    order: Pointer,  # [rows] int64
    starts: Pointer,  # [programs] int32
    rows: int,
    BLOCK: tl.constexpr,
) -> None:
    """Find where a group begins, by counting what belongs to those before it; then write its rows from there on."""
    group = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, rows, BLOCK):
        of = tl.load(group_of + first + place, mask=first + place < rows, other=group)
        before += (of < group).to(tl.int32)
    start = tl.sum(before, axis=0)
    tl.store(starts + group, start)
    for first in range(0, rows, BLOCK):
        inside = first + place < rows
        own = (tl.load(group_of + first + place, mask=inside, other=0) == group) & inside
        found = own.to(tl.int32)
        tl.store(order + start + tl.cumsum(found, axis=0) - 1, (first + place).to(tl.int64), mask=own)
        start += tl.sum(found, axis=0)


def grouped_product(
    x: Tensor,  # [⌈P / C⌉ or more, K]  bfloat16 or float16
    weight: Tensor,  # [G, N, K]  same dtype; silu: [G, 2N, K], gate, then up
    groups: Groups,
    out: Tensor,  # [P or more, N]  same dtype, changed in place
    choices: int = 1,  # C: row r of `out` is of row r // C of `x`
    silu: bool = False,  # silu(x·gateᵀ) · (x·upᵀ) instead of the product
    add: bool = False,  # to what `out` holds, the product rounded first
) -> None:
    """Write (or add) to each row of a group its product with the group's matrix. Other rows are not touched.

    Raises:
        ShapeError: an argument disagrees with the shapes above.

    Cost: the matrix of every group that has rows, once for each of its tiles of rows.
    """
    _check(x, weight, groups, out, choices, silu)
    if x.is_cuda:
        grouped_product_triton(x, weight, groups, out, choices, silu, add)
        return
    starts = groups.starts.tolist()
    for group in range(groups.count):
        rows = groups.order[starts[group] : starts[group + 1]]
        if len(rows):
            result = linear_fixed_tiles(x[rows // choices], weight[group])
            result = silu_mul(result) if silu else result
            out[rows] = out[rows] + result if add else result


def grouped_product_triton(
    x: Tensor, weight: Tensor, groups: Groups, out: Tensor, choices: int = 1, silu: bool = False, add: bool = False
) -> None:
    """Do `grouped_product` by the kernel.

    Raises:
        ShapeError: `out` or `groups` is not contiguous, or of another dtype.
    """
    check_layout("out", out, x.dtype)
    check_layout("order", groups.order, torch.int64)
    check_layout("starts", groups.starts, torch.int32)
    rows, (width, depth) = groups.order.shape[0], (out.shape[1], x.shape[1])
    if rows == 0:
        return
    launch = launch_for("gemm", -(-rows // groups.count), device_of(x))  # as many rows as a group has on average
    tiles = rows // launch.block_m + min(rows, groups.count)
    block_n = columns_of(launch, width, tiles, silu)
    _grouped_kernel[(tiles * -(-width // block_n),)](
        x.contiguous(),
        weight.contiguous(),
        groups.order,
        groups.starts,
        out,
        tiles,
        CHOICES=choices,
        COUNT=groups.count,
        GROUPS=power_of_two(groups.count),
        WIDTH=width,
        DEPTH=depth,
        SILU=silu,
        ADD=add,
        BLOCK_M=launch.block_m,
        BLOCK_N=block_n,
        BLOCK_K=step_of(launch, depth),
        PLAIN=INTERPRETED,
        **launch.options,
    )


@jit
def _grouped_kernel(
    x: Pointer,  # [·, DEPTH]
    weight: Pointer,  # [COUNT, WIDTH, DEPTH]; SILU: [COUNT, 2 · WIDTH, DEPTH]
    order: Pointer,  # [P] int64
    starts: Pointer,  # [COUNT + 1] int32
    out: Pointer,  # [·, WIDTH]
    tiles: int,
    CHOICES: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SILU: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    group, first = _tile(starts, tl.program_id(0) % tiles, COUNT, GROUPS, BLOCK_M)
    if group < COUNT:
        place = first + tl.arange(0, BLOCK_M)
        present = place < tl.load(starts + group + 1)
        row = tl.load(order + place, mask=present, other=0)
        column = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = weight + group.to(tl.int64) * (2 * WIDTH if SILU else WIDTH) * DEPTH
        result = tile_product(x, matrix, None, row // CHOICES, present, column, WIDTH, DEPTH, SILU, BLOCK_K, PLAIN)
        at = out + row[:, None] * WIDTH + column[None, :]
        inside = present[:, None] & (column < WIDTH)[None, :]
        if ADD:
            held = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            result = narrow(held + result.to(tl.float32), out.dtype.element_ty, PLAIN)
        tl.store(at, result, mask=inside)


@jit
def _tile(
    starts: Pointer, index: Block, COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[Block, Block]:
    """Return the group of a tile of rows, `COUNT` or more beyond the last, and where in `order` the tile begins."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(starts + group, mask=group < COUNT, other=0)
    end = tl.load(starts + group + 1, mask=group < COUNT, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    chosen = tl.sum((tl.cumsum(tiles, axis=0) <= index).to(tl.int32), axis=0)
    before = tl.sum(tl.where(group < chosen, tiles, 0), axis=0)
    own = tl.sum(tl.where(group == chosen, begin, 0), axis=0)
    return chosen, own + (index - before) * BLOCK_M


def _check(x: Tensor, weight: Tensor, groups: Groups, out: Tensor, choices: int, silu: bool) -> None:
    if x.ndim != 2 or out.ndim != 2:
        raise ShapeError(f"`x` {list(x.shape)} and `out` {list(out.shape)} are not [·, K] and [·, N]")
    check_shape("weight", weight, groups.count, (2 if silu else 1) * out.shape[1], x.shape[1])
    if not 1 <= groups.count <= MOST_GROUPS:
        raise ShapeError(f"{groups.count} groups are not 1 … {MOST_GROUPS}")
    rows = groups.order.shape[0]
    if choices < 1 or x.shape[0] * choices < rows or out.shape[0] < rows:
        raise ShapeError(f"`groups` has {rows} rows, `x` {x.shape[0]} of {choices} choices each, `out` {out.shape[0]}")
    if not x.dtype == weight.dtype == out.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise ShapeError(f"`x`, `weight` and `out` are {x.dtype}, {weight.dtype}, {out.dtype}, not one of 16 bits")


def grouped_product_reference(x: Tensor, weight: Tensor, groups: Groups, choices: int = 1) -> Tensor:
    """Return the products [P, N] in float64, rounded once, in the order of `groups.order`."""
    sizes = (groups.starts[1:] - groups.starts[:-1]).long()
    of = torch.repeat_interleave(torch.arange(groups.count, device=sizes.device), sizes)
    rows = groups.order[: len(of)] // choices
    return torch.einsum("pk,pnk->pn", x[rows].double(), weight[of].double()).to(x.dtype)
