"""Linear: x·Wᵀ + b, the bits of a row independent of how many rows stand beside it.

Numeric contract: row m of the result depends on row m of `x` and the weight alone, for every number of rows. On the
CPU in bfloat16 oneDNN keeps that for two rows and more (measured on AVX512-bf16 and AMX for every M from 2 to 2,048,
one and two threads); a single row takes another path, so it is given a companion. Where a machine does not keep it,
`FixedTiles` does: every product then has the same number of rows. `verify_invariance` finds out at start-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.shape import ShapeError

TILE_M = 32  # rows of a fixed tile
PROBED_ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 129, 257)

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(
    x: Tensor,  # [M, K]  M ≥ 1
    weight: Tensor,  # [N, K]  same dtype
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """Return x·weightᵀ + bias by the library's own product.

    Raises:
        ShapeError: an argument disagrees with the shapes above.
    """
    _check(x, weight, bias)
    if x.shape[0] == 1:
        return F.linear(x.expand(2, -1), weight, bias)[:1]
    return F.linear(x, weight, bias)


def linear_fixed_tiles(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same by products of exactly `TILE_M` rows, the last one padded: invariant wherever one product is."""
    _check(x, weight, bias)
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE_M))
    return torch.cat([F.linear(tile, weight, bias) for tile in torch.split(padded, TILE_M)])[:rows]


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same in float64, rounded once."""
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)


def verify_invariance(function: Linear, shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> bool:
    """Return whether `function` keeps the contract on this machine, for weights of `shapes` [(N, K), …].

    Every number of rows in PROBED_ROWS is compared, byte for byte, at two offsets, with the widest product.
    """
    generator = torch.Generator().manual_seed(0)
    most = max(PROBED_ROWS)
    for n, k in sorted(set(shapes)):
        weight = torch.randn(n, k, generator=generator).to(dtype)
        x = torch.randn(most + 1, k, generator=generator).to(dtype)
        whole = function(x, weight, None)
        for rows in PROBED_ROWS:
            for offset in (0, most + 1 - rows):
                if not torch.equal(function(x[offset : offset + rows], weight, None), whole[offset : offset + rows]):
                    return False
    return True


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.shape[0] < 1:
        raise ShapeError(f"`x` {list(x.shape)} and `weight` {list(weight.shape)} are not [M, K] and [N, K]")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(f"`bias` has shape {list(bias.shape)}, not [{weight.shape[0]}]")
