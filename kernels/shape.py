"""What every kernel says when its arguments disagree with its signature."""

from __future__ import annotations

from torch import Tensor


class ShapeError(ValueError):
    """An argument does not have the shape that the signature gives it."""


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ShapeError unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"`{name}` has shape {list(tensor.shape)}, not {list(shape)}")
