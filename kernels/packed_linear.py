"""Packed linear: x·Wᵀ + b, the weight laid out once as oneDNN reads it fastest, instead of in every call.

Numeric contract: that of linear.py, and `verify_invariance` tests a machine for it, shape by shape. How a weight is
laid out depends on how many rows it is packed for. Measured with torch 2.13 on one CPU (AVX512-bf16, AMX), ten shapes,
1 to 257 rows, a single one too: packed for one row all were invariant but K = 4,864; packed for 32, those of K = 256.
So there are two: packed for one row, for any number of rows; and packed for 32, with exactly 32 rows in every product.
Beside `linear`, in one run: 0.4 to 0.8 of its time up to 32 rows, 0.7 to 0.9 at 128.

In bfloat16 alone, where the processor has it. The operation is torch's own for frozen graphs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import TILE_M
from kernels.shape import ShapeError, check_shape

_ops: Any = torch.ops.mkldnn
_NEEDED = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")  # not every build has them


def packs(dtype: torch.dtype) -> bool:
    """Return whether weights of `dtype` can be packed here."""
    if dtype is not torch.bfloat16 or not torch._C._has_mkldnn or not all(hasattr(_ops, name) for name in _NEEDED):
        return False
    return bool(_ops._is_mkldnn_bf16_supported())


def pack_for_any(weight: Tensor) -> Tensor:
    """Return a weight [N, K] packed for `packed_linear`; it can be used for nothing else."""
    packed: Tensor = _ops._reorder_linear_weight(weight.contiguous(), 1)
    return packed


def pack_for_tiles(weight: Tensor) -> Tensor:
    """Return a weight [N, K] packed for `packed_linear_tiles`; it can be used for nothing else."""
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
    _check(x, weight, bias)
    product: Tensor = _ops._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def packed_linear_tiles(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same by products of exactly `TILE_M` rows, the last one padded."""
    _check(x, weight, bias)
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE_M))
    tiles = [_ops._linear_pointwise(tile, weight, bias, "none", [], "") for tile in torch.split(padded, TILE_M)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.shape[0] < 1:
        raise ShapeError(f"`x` {list(x.shape)} and `weight` {list(weight.shape)} are not [M, K] and [N, K]")
    if bias is not None:
        check_shape("bias", bias, weight.shape[0])
