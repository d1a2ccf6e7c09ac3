"""What every kernel says when its arguments disagree with its signature."""

from __future__ import annotations

import torch
from torch import Tensor


class ShapeError(ValueError):
    """An argument does not have the shape that the signature gives it."""


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ShapeError unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"`{name}` has shape {list(tensor.shape)}, not {list(shape)}")


def check_layout(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ShapeError unless `tensor` holds `dtype`, one element beside the other."""
    if tensor.dtype != dtype:
        raise ShapeError(f"`{name}` holds {tensor.dtype}, not {dtype}")
    if not tensor.is_contiguous():
        raise ShapeError(f"`{name}` is not contiguous")


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raise ShapeError unless the three are [M, K], [N, K] and [N], M ≥ 1."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.shape[0] < 1:
        raise ShapeError(f"`x` {list(x.shape)} and `weight` {list(weight.shape)} are not [M, K] and [N, K]")
    if bias is not None:
        check_shape("bias", bias, weight.shape[0])
