"""RMSNorm, alone and with the residual added first. One row at a time; float32 inside, rounded once.

Numeric contract: a row's bits depend on that row and the weight alone. Source: Zhang and Sennrich, 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    added = x + residual
    return rms_norm(added, weight, epsilon), added


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the same in float64, rounded where the definition in bfloat16 rounds."""
    wide = x.double()
    normed = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)
