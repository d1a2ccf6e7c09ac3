"""SiLU of the gate times the up projection, elementwise. Source: Shazeer, 2020 (SwiGLU).

Numeric contract, in bfloat16: an element's bits depend on it alone. In float32 the library's vector and tail loops were
seen to differ in the last bit, so that where a row lies in memory would show; nothing here runs it in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.shape import ShapeError


def silu_mul(
    gate_up: Tensor,  # [M, 2I]  gate, then up
) -> Tensor:  # [M, I]
    """Return silu(gate) · up.

    Raises:
        ShapeError: the last dimension is odd.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ShapeError(f"`gate_up` has shape {list(gate_up.shape)}, not [M, 2I]")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Return the same in float64; the gate is rounded before it is multiplied, as above."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return ((gate / (1 + torch.exp(-gate))).to(gate_up.dtype).double() * up).to(gate_up.dtype)
