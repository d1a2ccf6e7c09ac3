"""Tensors that lie between NaN: whatever reads beyond them shows, and whatever writes beyond them is found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 256  # elements on either side, a multiple of every alignment that a kernel is compiled for


@dataclass(frozen=True, slots=True)
class Guarded:
    """A contiguous tensor in the middle of a buffer whose other elements are NaN."""

    buffer: Tensor  # [MARGIN + n + MARGIN]
    tensor: Tensor  # [...] n elements of it

    @property
    def untouched(self) -> bool:
        return all(bool(margin.float().isnan().all()) for margin in (self.buffer[:MARGIN], self.buffer[-MARGIN:]))


def guarded(tensor: Tensor) -> Guarded:
    """Return a copy of a floating-point `tensor` between NaN."""
    buffer = torch.full((tensor.numel() + 2 * MARGIN,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[MARGIN:-MARGIN].view(tensor.shape)
    inner.copy_(tensor)
    return Guarded(buffer, inner)


def among_nan(tensor: Tensor) -> Tensor:
    return guarded(tensor).tensor
