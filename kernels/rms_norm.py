"""RMSNorm, alone and with the residual added first. One row at a time; float32 inside, rounded once.

Numeric contract: a row's bits depend on that row and the weight alone. On a GPU one program takes one row, with a block
and warps fixed by the row's length. Source: Zhang and Sennrich, 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import INTERPRETED, Pointer, jit, narrow, tl
from kernels.launch import device_of, launch_for, power_of_two
from kernels.shape import check_shape


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    epsilon: float,
) -> Tensor:  # [..., H], dtype of x
    """Return x / rms(x) · weight.

    Raises:
        ShapeError: `weight` is not [H].
    """
    check_shape("weight", weight, x.shape[-1])
    if x.is_cuda:
        return rms_norm_triton(x, weight, epsilon)
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(
    x: Tensor,  # [M, H]
    residual: Tensor,  # [M, H]
    weight: Tensor,  # [H]
    epsilon: float,
) -> tuple[Tensor, Tensor]:  # [M, H] normed, [M, H] the new residual
    """Return rms_norm(x + residual) and x + residual, the sum rounded to the dtype of x.

    Raises:
        ShapeError: the shapes disagree.
    """
    check_shape("residual", residual, *x.shape)
    if x.is_cuda:
        check_shape("weight", weight, x.shape[-1])
        return add_rms_norm_triton(x, residual, weight, epsilon)
    added = x + residual
    return rms_norm(added, weight, epsilon), added


def rms_norm_triton(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return `rms_norm` by the kernel; x [..., H]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x.contiguous(), None, weight, out, None, epsilon)
    return out


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `add_rms_norm` by the kernel, in one pass."""
    out, added = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(x.contiguous(), residual.contiguous(), weight, out, added, epsilon)
    return out, added


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, added: Tensor | None, epsilon: float
) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    if rows == 0:
        return
    _rms_norm_kernel[(rows,)](
        x,
        residual,
        weight.contiguous(),
        out,
        added,
        epsilon,
        WIDTH=width,
        BLOCK=power_of_two(width),
        PLAIN=INTERPRETED,
        **launch_for("rms_norm", width, device_of(x)).options,
    )


@jit
def _rms_norm_kernel(
    x: Pointer,  # [rows, WIDTH]
    residual: Pointer,  # [rows, WIDTH], or None
    weight: Pointer,  # [WIDTH]
    out: Pointer,  # [rows, WIDTH]
    added: Pointer,  # [rows, WIDTH], or None
    epsilon: float,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    dtype: tl.constexpr = out.dtype.element_ty
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        summed = narrow(wide + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32), dtype, PLAIN)
        tl.store(added + at, summed, mask=inside)
        wide = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + epsilon)
    normed = narrow(wide * scale, dtype, PLAIN).to(tl.float32)
    scaled = normed * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(scaled, dtype, PLAIN), mask=inside)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the same in float64, rounded where the definition in bfloat16 rounds."""
    wide = x.double()
    normed = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)
