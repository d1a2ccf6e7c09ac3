"""SiLU of the gate times the up projection, sixteen numbers at a time. See silu_mul.py for the plain version.

Numeric contract: an element's bits depend on it alone. The gate is rounded to bfloat16 before it is multiplied.
Source: Shazeer, 2020 (SwiGLU).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.compilation import compiled, part
from kernels.lanes import (
    LANES,
    claim,
    fill,
    integer_at,
    over,
    plus,
    power_of_two,
    put_halves,
    rounded,
    sixteen_halves_at,
    times,
)
from kernels.shape import ShapeError, check_layout
from kernels.silu_mul import silu_mul_reference
from kernels.team import TAKEN, run, shares, threads_for

_MINUS_LOG2E = np.float32(-math.log2(math.e))
_LEAST = 1 << 13  # numbers that are worth another thread
_ONE = np.float32(1)


def takes(width: int) -> bool:
    """Return whether gates of this width are computed here."""
    return width >= LANES


def lane_silu_mul(
    gate_up: Tensor,  # [M, 2I] bfloat16: gate, then up; I ≥ 16
) -> Tensor:  # [M, I]
    """Return silu(gate) · up.

    Raises:
        ShapeError: the shape or the dtype is another.
    """
    check_layout("gate_up", gate_up, torch.bfloat16)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not takes(gate_up.shape[1] // 2):
        raise ShapeError(f"`gate_up` has shape {list(gate_up.shape)}, not [M, 2I] with I ≥ {LANES}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    together = shares(rows, -(-_LEAST // width))
    items = -(-rows // together)
    run(_kernel(), threads_for(items), items, together, gate_up, out, rows, width)
    return out


@cache
def _kernel() -> int:
    return compiled(_silu_mul)


def _silu_mul(data: int) -> None:
    items, together = integer_at(data + 16), integer_at(data + 24)
    gate_up, out = integer_at(data + 32), integer_at(data + 40)
    rows, width = integer_at(data + 48), integer_at(data + 56)
    item = claim(data + TAKEN)
    while item < items:
        for row in range(item * together, min(item * together + together, rows)):
            source, to = gate_up + row * width * 4, out + row * width * 2
            for column in range(0, width, LANES):
                place = min(column, width - LANES) * 2  # the last may begin among those before, and give the same
                gate, up = sixteen_halves_at(source + place), sixteen_halves_at(source + width * 2 + place)
                put_halves(to + place, silu_times(gate, up))
        item = claim(data + TAKEN)


@part
def silu_times(gate: Any, up: Any) -> Any:
    """silu(gate) · up, of sixteen of each."""
    opened = over(gate, plus(fill(_ONE), power_of_two(times(gate, fill(_MINUS_LOG2E)))))
    return times(rounded(opened), up)


def verify_invariance(width: int) -> bool:
    """Return whether a row has the same bits here alone and elsewhere in memory, and those of the function."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(7, 2 * width, generator=generator).mul(4).bfloat16()
    whole = lane_silu_mul(gate_up)
    same = torch.equal(torch.cat([lane_silu_mul(row.clone()) for row in torch.split(gate_up, 1)]), whole)
    return same and torch.allclose(whole.float(), silu_mul_reference(gate_up).float(), atol=0.02, rtol=0.02)
