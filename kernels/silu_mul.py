"""SiLU of the gate times the up projection, elementwise. Source: Shazeer, 2020 (SwiGLU).

Numeric contract, in bfloat16: an element's bits depend on it alone. In float32 the library's vector and tail loops were
seen to differ in the last bit, so that where a row lies in memory would show; nothing here runs it in float32. The gate
is rounded to the dtype before it is multiplied, here as in the kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import INTERPRETED, Block, Pointer, jit, narrow, tl
from kernels.launch import device_of, launch_for
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
    if gate_up.is_cuda:
        return silu_mul_triton(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """Return `silu_mul` by the kernel."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        launch = launch_for("silu_mul", width, device_of(gate_up))
        grid = (rows, -(-width // launch.block_n))
        _silu_mul_kernel[grid](
            gate_up.contiguous(), out, WIDTH=width, BLOCK=launch.block_n, PLAIN=INTERPRETED, **launch.options
        )
    return out


@jit
def _silu_mul_kernel(
    gate_up: Pointer,  # [rows, 2 · WIDTH]
    out: Pointer,  # [rows, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, gated(gate, up, out.dtype.element_ty, PLAIN), mask=inside)


@jit
def gated(gate: Block, up: Block, dtype: tl.constexpr, PLAIN: tl.constexpr) -> Block:
    """Return silu(gate) · up, of float32 that holds values of `dtype`, rounded twice."""
    opened = narrow(gate / (1 + tl.exp(-gate)), dtype, PLAIN).to(tl.float32)
    return narrow(opened * up, dtype, PLAIN)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Return the same in float64; the gate is rounded before it is multiplied, as above."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return ((gate / (1 + torch.exp(-gate))).to(gate_up.dtype).double() * up).to(gate_up.dtype)
