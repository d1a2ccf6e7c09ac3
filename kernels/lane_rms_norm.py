"""RMSNorm, alone and with the residual added first, sixteen numbers at a time. See rms_norm.py for the plain version.

Numeric contract: a row's bits depend on that row and the weight alone. Squares are added up by sixteens, in ascending
order, then across lanes; rounded where rms_norm.py rounds. Source: Zhang and Sennrich, 2019.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.compilation import compiled, part
from kernels.lanes import (
    LANES,
    bits_of,
    claim,
    fill,
    fused,
    integer_at,
    number_at,
    plus,
    put_halves,
    rounded,
    sixteen_halves_at,
    sum_of,
    times,
)
from kernels.rms_norm import rms_norm_reference
from kernels.shape import ShapeError, check_layout, check_shape
from kernels.team import TAKEN, run, shares, threads_for

_LEAST = 1 << 14  # numbers that are worth another thread
_ONE = np.float32(1)
_ZERO = np.float32(0)


def takes(width: int) -> bool:
    """Return whether rows of this width are computed here."""
    return width % LANES == 0 and width >= LANES


def lane_rms_norm(
    x: Tensor,  # [M, H] bfloat16, H a multiple of 16
    weight: Tensor,  # [H]
    epsilon: float,
) -> Tensor:  # [M, H]
    """Return x / rms(x) · weight.

    Raises:
        ShapeError: the shapes or the dtypes disagree.
    """
    _check(x, weight)
    out = torch.empty_like(x)
    _run(x, None, weight, out, None, epsilon)
    return out


def lane_add_rms_norm(
    x: Tensor,  # [M, H] bfloat16, H a multiple of 16
    residual: Tensor,  # [M, H]
    weight: Tensor,  # [H]
    epsilon: float,
) -> tuple[Tensor, Tensor]:  # [M, H] normed, [M, H] the new residual
    """Return the norm of x + residual, and x + residual, rounded to the dtype of x.

    Raises:
        ShapeError: the shapes or the dtypes disagree.
    """
    _check(x, weight)
    check_shape("residual", residual, *x.shape)
    check_layout("residual", residual, torch.bfloat16)
    out, added = torch.empty_like(x), torch.empty_like(x)
    _run(x, residual, weight, out, added, epsilon)
    return out, added


def _check(x: Tensor, weight: Tensor) -> None:
    check_layout("x", x, torch.bfloat16)
    check_layout("weight", weight, torch.bfloat16)
    if x.ndim != 2 or not takes(x.shape[1]):
        raise ShapeError(f"`x` has shape {list(x.shape)}: rows must be a multiple of {LANES} wide")
    check_shape("weight", weight, x.shape[1])


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, added: Tensor | None, epsilon: float) -> None:
    rows, width = x.shape
    together = shares(rows, -(-_LEAST // width))
    items = -(-rows // together)
    run(
        _kernel(),
        threads_for(items),
        items,
        together,
        x,
        residual,
        weight,
        out,
        added,
        rows,
        width,
        bits_of(epsilon),
    )


@cache
def _kernel() -> int:
    return compiled(_norm)


def _norm(data: int) -> None:
    items, together = integer_at(data + 16), integer_at(data + 24)
    x, residual, weight = integer_at(data + 32), integer_at(data + 40), integer_at(data + 48)
    out, added, rows = integer_at(data + 56), integer_at(data + 64), integer_at(data + 72)
    row_bytes, epsilon = integer_at(data + 80) * 2, number_at(data + 88)
    item = claim(data + TAKEN)
    while item < items:
        for row in range(item * together, min(item * together + together, rows)):
            source = x + row * row_bytes
            if residual != 0:
                for place in range(0, row_bytes, LANES * 2):
                    total = plus(
                        sixteen_halves_at(source + place), sixteen_halves_at(residual + row * row_bytes + place)
                    )
                    put_halves(added + row * row_bytes + place, total)
                source = added + row * row_bytes
            norm_row(source, weight, out + row * row_bytes, row_bytes // 2, epsilon)
        item = claim(data + TAKEN)


@part
def norm_row(source: int, weight: int, out: int, width: int, epsilon: float) -> None:
    squares = fill(_ZERO)
    for place in range(0, width * 2, LANES * 2):
        numbers = sixteen_halves_at(source + place)
        squares = fused(numbers, numbers, squares)
    scale = fill(_ONE / math.sqrt(sum_of(squares) / np.float32(width) + epsilon))
    for place in range(0, width * 2, LANES * 2):
        normed = rounded(times(sixteen_halves_at(source + place), scale))
        put_halves(out + place, times(normed, sixteen_halves_at(weight + place)))


def verify_invariance(width: int) -> bool:
    """Return whether a row has the same bits here alone, among others and elsewhere in memory, and those of a norm."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(19, width, generator=generator).bfloat16() for _ in range(2))
    weight = torch.rand(width, generator=generator).bfloat16()
    normed, added = lane_add_rms_norm(x, residual, weight, 1e-6)
    alone = torch.cat([lane_rms_norm(row, weight, 1e-6) for row in torch.split(added, 1)])
    later = lane_rms_norm(added[3:], weight, 1e-6)
    exact = rms_norm_reference(added, weight, 1e-6)
    same = torch.equal(added, x + residual) and torch.equal(alone, normed) and torch.equal(later, normed[3:])
    return same and torch.allclose(normed.float(), exact.float(), atol=0.02, rtol=0.02)
