"""How the rows of a borrowed pass are padded, so that where a row lies in memory shows in none of its bits.

The library computes elementwise functions by vectors and what is left of a tensor one by one, not always with the same
bits (torch 2.13, AVX512: gelu, and in float32 silu, sigmoid and softplus); threads share a tensor out evenly; a single
row has other strides than many. Whole vectors for every thread leave none of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

VECTORS = 32  # elements: two vectors of 512 bits, in float32


def missing_rows(count: int) -> int:
    """Return how many rows are to be added to `count`."""
    return -count % (VECTORS * torch.get_num_threads())


def padded(x: Tensor) -> Tensor:
    """Return x [T, …] followed by copies of its last row, which take the same experts through a model as it does."""
    missing = missing_rows(len(x))
    return torch.cat((x, x[-1:].expand(missing, *x.shape[1:]))) if missing else x
