"""Packed linear: x·Wᵀ + b, the weight laid out once as oneDNN reads it fastest, instead of in every call.

Numeric contract: that of linear.py, and `verify_invariance` tests a machine for it, shape by shape. A weight is laid
out for a number of rows. Laid out for one, the product was invariant for nine of the ten shapes of bench_linear.py, a
single row too, and not for K = 4,864: with many rows the library cuts a long K into pieces. Up to 32 rows it was seen
to do so for none, laid out for one row or for 32, whichever suits the shape; so there are products that take 32 rows
at most at a time, and a last one that always takes exactly 32. Measured there (torch 2.13, AVX512-bf16 and AMX, one
thread): 0.46 to 0.83 of the time of `linear` up to 32 rows, 0.69 to 1 at 128.

In bfloat16 alone, where the processor has it. The operation is torch's own for frozen graphs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import TILE_M
from kernels.shape import check_product

_ops: Any = torch.ops.mkldnn
_NEEDED = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")  # not every build has them


def packs(dtype: torch.dtype) -> bool:
    """Return whether weights of `dtype` can be packed here."""
    if dtype is not torch.bfloat16 or not torch._C._has_mkldnn or not all(hasattr(_ops, name) for name in _NEEDED):
        return False
    return bool(_ops._is_mkldnn_bf16_supported())


def pack_for_any(weight: Tensor) -> Tensor:
    """Return a weight [N, K] packed for `packed_linear` or `packed_linear_pieces`; for nothing else."""
    packed: Tensor = _ops._reorder_linear_weight(weight.contiguous(), 1)
    return packed


def pack_for_tiles(weight: Tensor) -> Tensor:
    """Return a weight [N, K] packed for `packed_linear_pieces` or `packed_linear_tiles`, for nothing else."""
    packed: Tensor = _ops._reorder_linear_weight(weight.contiguous(), TILE_M)
    return packed


def packed_linear(
    x: Tensor,  # [M, K] bfloat16  M ≥ 1
    weight: Tensor,  # [N, K] packed
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """Return x·weightᵀ + bias.

    Raises:
        ShapeError: an argument disagrees with the shapes above.
    """
    check_product(x, weight, bias)
    product: Tensor = _ops._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def packed_linear_pieces(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same by products of `TILE_M` rows, the last one of what is left."""
    check_product(x, weight, bias)
    pieces = [_ops._linear_pointwise(piece, weight, bias, "none", [], "") for piece in torch.split(x, TILE_M)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def packed_linear_tiles(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same by products of exactly `TILE_M` rows, the last one padded."""
    check_product(x, weight, bias)
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE_M))
    tiles = [_ops._linear_pointwise(tile, weight, bias, "none", [], "") for tile in torch.split(padded, TILE_M)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]
