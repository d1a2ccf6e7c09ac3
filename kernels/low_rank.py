"""Low rank: what an adapter adds to a product, x·Aᵀ·Bᵀ, for those rows of a step that are its own.

Numeric contract: what is added to a row depends on that row of `x`, A and B alone. Every product has exactly `TILE_M`
rows, padded with zeros, however many rows an adapter has; `verify_invariance` of linear.py tests a machine for that.
Tiles are fixed even where the library's own product would do: otherwise what was chosen for an adapter's shapes would
stand in the numeric policy, and to load a further adapter would put the answers of all others under another one. Rows
that are not an adapter's keep their bits: they are not touched.

`add_low_rank_batch` does it for the rows of many adapters at once. On a GPU that is two launches of the kernel of
grouped.py, x·Aᵀ and then ·Bᵀ, added to what is there: K and R are walked in one order, and it rounds where the above
rounds. A rank below the stack's is filled up with zeros, which add nothing to any sum.

Source: Hu et al., ICLR 2022 (LoRA); Chen et al., MLSys 2024 (many adapters in one batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grouped import Groups, grouped_product_triton
from kernels.linear import TILE_M
from kernels.shape import ShapeError, check_layout, check_shape


@dataclass(frozen=True, slots=True)
class LowRank:
    """An adapter's share of one product of K inputs and N outputs. Where the product fuses several, their A stand one
    below the other, and B is zero where an output is of one and a column of another."""

    down: Tensor  # A [R, K]
    up: Tensor  # B [N, R], times the adapter's scale


def add_low_rank(
    product: Tensor,  # [T, N]  changed in place
    x: Tensor,  # [T, K]  same dtype
    rows: Tensor | None,  # [M] int64, each once, 0 ≤ row < T; None: all of them
    adapter: LowRank,
) -> None:
    """Add x·Aᵀ·Bᵀ to the rows of an adapter.

    Raises:
        ShapeError: an argument disagrees with the shapes above.

    Cost: 2 · R · (K + N) operations a row, of M rows rounded up to a multiple of `TILE_M`.
    """
    _check(product, x, rows, adapter)
    if rows is None:
        product += _delta(x, adapter)
    else:
        product.index_add_(0, rows, _delta(x.index_select(0, rows), adapter))


@dataclass(frozen=True, slots=True)
class LowRankStack:
    """The shares of G adapters of one product, each filled up with zeros to the highest rank among them."""

    down: Tensor  # [G, R, K]
    up: Tensor  # [G, N, R]


def stack_low_rank(adapters: Sequence[LowRank]) -> LowRankStack:
    """Return the stack of at least one adapter of the same product."""
    rank = max(adapter.down.shape[0] for adapter in adapters)
    return LowRankStack(
        torch.stack([F.pad(adapter.down, (0, 0, 0, rank - adapter.down.shape[0])) for adapter in adapters]),
        torch.stack([F.pad(adapter.up, (0, rank - adapter.up.shape[1])) for adapter in adapters]),
    )


def add_low_rank_batch(
    product: Tensor,  # [T, N]  changed in place
    x: Tensor,  # [T, K]  same dtype
    groups: Groups,  # of rows < T, by adapter; a row that is in none is computed without
    stack: LowRankStack,
) -> None:
    """Add to every row of an adapter its x·Aᵀ·Bᵀ.

    Raises:
        ShapeError: an argument disagrees with the shapes above.

    Cost: 2 · R · (K + N) operations a row; A and B of every adapter that has rows are read once.
    """
    _check_batch(product, x, groups, stack)
    if x.is_cuda:
        add_low_rank_batch_triton(product, x, groups, stack)
        return
    starts = groups.starts.tolist()
    for group in range(groups.count):
        rows = groups.order[starts[group] : starts[group + 1]]
        if len(rows):
            add_low_rank(product, x, rows, LowRank(stack.down[group], stack.up[group]))


def add_low_rank_batch_triton(product: Tensor, x: Tensor, groups: Groups, stack: LowRankStack) -> None:
    """Do `add_low_rank_batch` by the kernel.

    Raises:
        ShapeError: `product` or `groups` is not contiguous, or of another dtype.
    """
    check_layout("product", product, x.dtype)
    inner = x.new_empty(x.shape[0], stack.down.shape[1])
    grouped_product_triton(x, stack.down, groups, inner)
    grouped_product_triton(inner, stack.up, groups, product, add=True)


def _delta(x: Tensor, adapter: LowRank) -> Tensor:
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE_M))
    tiles = [F.linear(F.linear(tile, adapter.down), adapter.up) for tile in torch.split(padded, TILE_M)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]


def add_low_rank_reference(product: Tensor, x: Tensor, rows: Tensor | None, adapter: LowRank) -> None:
    """Add the same, in float64, rounded once."""
    chosen = torch.arange(x.shape[0]) if rows is None else rows
    delta = x[chosen].double() @ adapter.down.double().T @ adapter.up.double().T
    product[chosen] = (product[chosen].double() + delta).to(product.dtype)


def _check(product: Tensor, x: Tensor, rows: Tensor | None, adapter: LowRank) -> None:
    down, up = adapter.down, adapter.up
    if product.ndim != 2 or x.ndim != 2 or product.shape[0] != x.shape[0]:
        raise ShapeError(f"`product` {list(product.shape)} and `x` {list(x.shape)} are not [T, N] and [T, K]")
    if down.ndim != 2 or tuple(up.shape) != (product.shape[1], down.shape[0]) or down.shape[1] != x.shape[1]:
        raise ShapeError(f"`adapter` {list(down.shape)}, {list(up.shape)} is not [R, K] and [N, R]")
    if rows is not None and (rows.ndim != 1 or not 1 <= rows.shape[0] <= x.shape[0]):
        raise ShapeError(f"`rows` has shape {list(rows.shape)}, not [M] with 1 ≤ M ≤ {x.shape[0]}")


def _check_batch(product: Tensor, x: Tensor, groups: Groups, stack: LowRankStack) -> None:
    if product.ndim != 2 or x.ndim != 2 or product.shape[0] != x.shape[0]:
        raise ShapeError(f"`product` {list(product.shape)} and `x` {list(x.shape)} are not [T, N] and [T, K]")
    if stack.down.ndim != 3:
        raise ShapeError(f"`stack.down` has shape {list(stack.down.shape)}, not [G, R, K]")
    rank = stack.down.shape[1]
    check_shape("stack.down", stack.down, groups.count, rank, x.shape[1])
    check_shape("stack.up", stack.up, groups.count, product.shape[1], rank)
    if groups.order.shape[0] > x.shape[0]:
        raise ShapeError(f"`groups` has {groups.order.shape[0]} rows, `x` {x.shape[0]}")
