"""Linear: x·Wᵀ + b, the bits of a row independent of how many rows stand beside it.

Numeric contract: row m of the result depends on row m of `x` and the weight alone, for every number of rows. Whether
oneDNN keeps that in bfloat16 depends on the machine, the shape and the threads. Measured with torch 2.13 on one CPU,
twelve shapes, up to 2,048 rows: with its AMX switched off (AVX512-bf16) all were invariant from two rows on; with AMX
those of K ≤ 384 were, and most of K ≥ 512 were not, the change lying between 16 and 1,024 rows. The cause was not
looked for. A single row may take another path than two, so it is given a companion.

`linear_fixed_tiles` gives every product the same number of rows and was invariant for all of them. In one run on a busy
machine, one thread, it took 1.03–1.3 times as long up to 32 rows for weights of 4 M values and more, up to twice as
long for small ones, and 2.4–6.8 times at 512 rows. `verify_invariance` finds out, shape by shape, at start-up.

On a GPU `linear_by_rows` takes our own product for few rows and the library's, forbidden to split K, for many. Only
where the two agree in every bit does it keep the contract; otherwise `gemm` of gemm.py for all rows is the fallback.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm import gemm, gemm_silu_mul
from kernels.shape import check_product
from kernels.silu_mul import silu_mul_triton

TILE_M = 32  # rows of a fixed tile
FEW_ROWS = 64  # up to here `linear_by_rows` takes our own product
PROBED_ROWS = (*range(1, 34), 48, 63, 64, 65, 80, 96, 112, 129)

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Pack = Callable[[Tensor], Tensor]  # lays a weight out for a product


def keep(weight: Tensor) -> Tensor:
    """Lay a weight out as it is."""
    return weight


def linear(
    x: Tensor,  # [M, K]  M ≥ 1
    weight: Tensor,  # [N, K]  same dtype
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """Return x·weightᵀ + bias by the library's own product.

    Raises:
        ShapeError: an argument disagrees with the shapes above.
    """
    check_product(x, weight, bias)
    if x.shape[0] == 1:
        return F.linear(x.expand(2, -1), weight, bias)[:1]
    return F.linear(x, weight, bias)


def linear_fixed_tiles(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same by products of exactly `TILE_M` rows, the last one padded: invariant wherever one product is."""
    check_product(x, weight, bias)
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE_M))
    return torch.cat([F.linear(tile, weight, bias) for tile in torch.split(padded, TILE_M)])[:rows]


def linear_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same on a GPU: up to `FEW_ROWS` rows by our own product, for more by the library's.

    `forbid_split_k` was called before: the library may otherwise share out K among programs.
    """
    check_product(x, weight, bias)
    return gemm(x, weight, bias) if x.shape[0] <= FEW_ROWS else F.linear(x, weight, bias)


WORKSPACE = {
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",  # KiB : buffers, the least
    "CUBLASLT_WORKSPACE_SIZE": "1",  # KiB
}


class StartedTooSoon(RuntimeError):
    """CUDA runs already, and its libraries were not told what they need to be told before."""


def silu_mul_by_rows(
    x: Tensor,  # [M, K]  M ≥ 1
    gate_up: Tensor,  # [2I, K]  same dtype; gate, then up
) -> Tensor:  # [M, I]
    """Return silu(x·gateᵀ) · (x·upᵀ) on a GPU: in one kernel for few rows, and for more the library's product first."""
    check_product(x, gate_up)
    return gemm_silu_mul(x, gate_up) if x.shape[0] <= FEW_ROWS else silu_mul_triton(F.linear(x, gate_up))


def forbid_split_k() -> None:
    """Have the library add up every element in one program and in float32, in this process. Call it before CUDA starts.

    The library is left without the memory that partial sums would need, and told not to use any. Of the two that torch
    has, cuBLASLt alone can be told: products of the other would then end in an error, so it is asked always.

    Raises:
        StartedTooSoon: CUDA runs, and this was not called before.
    """
    cuda: Any = torch.cuda
    told = all(os.environ.get(name) == value for name, value in WORKSPACE.items())
    if cuda.is_initialized() and not told:  # the library reads its environment once
        raise StartedTooSoon("CUDA was started before its library was told not to split sums")
    os.environ.update(WORKSPACE)
    settings: Any = torch.backends.cuda.matmul  # what it is declared to take is narrower than what it takes
    settings.allow_tf32 = False
    settings.allow_bf16_reduced_precision_reduction = (False, False)
    settings.allow_fp16_reduced_precision_reduction = (False, False)
    if torch.version.cuda:  # a build for CPUs has neither
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the choice being an experiment
            torch.backends.cuda.preferred_blas_library("cublaslt")


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same in float64, rounded once."""
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)


def verify_invariance(
    function: Linear,
    shape: tuple[int, int],
    dtype: torch.dtype,
    most_rows: int,
    device: str = "cpu",
    pack: Pack = keep,  # what `function` wants its weights to be
) -> bool:
    """Return whether `function` keeps the contract here for weights of `shape` (N, K) and up to `most_rows` rows.

    Every number of rows in `probed_rows` is compared, byte for byte, at two offsets, with the widest product.
    """
    n, k = shape
    generator = torch.Generator(device).manual_seed(0)
    weight = pack(torch.randn(n, k, generator=generator, dtype=dtype, device=device))
    x = torch.randn(most_rows + 1, k, generator=generator, dtype=dtype, device=device)
    whole = function(x, weight, None)
    return all(
        torch.equal(function(x[offset : offset + rows], weight, None), whole[offset : offset + rows])
        for rows in probed_rows(most_rows)
        for offset in (0, most_rows + 1 - rows)
    )


def probed_rows(most: int) -> list[int]:
    """Return the numbers of rows to try: the small ones, and around every further power of two up to `most`."""
    powers = [1 << bit for bit in range(8, most.bit_length() + 1)]
    around = [rows for power in powers for rows in (power - 1, power, power + 1)]
    return sorted({rows for rows in (*PROBED_ROWS, *around, most) if rows <= most})
