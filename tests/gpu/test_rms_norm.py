"""RMSNorm by its kernel, alone and with the residual added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.jit import INTERPRETED
from kernels.rms_norm import add_rms_norm_triton, rms_norm_reference, rms_norm_triton
from tests.support.batches import DTYPE, MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan

TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
WIDTHS = [1, 3, 64, 100, 173, 896, 1025, 4097]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_equals_the_reference_between_poison(
    width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    x = among_nan(torch.randn(7, width, generator=generator).mul(3).to(device, dtype))
    weight = among_nan(torch.randn(width, generator=generator).to(device, dtype))
    out = rms_norm_triton(x, weight, 1e-6)
    torch.testing.assert_close(out, rms_norm_reference(x, weight, 1e-6), rtol=TOLERANCE[dtype], atol=1e-4)


@dtypes
@pytest.mark.parametrize("width", [3, 173, 1025])
def test_adding_first_is_adding_and_norming(
    width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    x, residual = (among_nan(torch.randn(5, width, generator=generator).to(device, dtype)) for _ in "xr")
    weight = among_nan(torch.randn(width, generator=generator).to(device, dtype))
    normed, added = add_rms_norm_triton(x, residual, weight, 1e-6)
    assert torch.equal(added, x + residual)
    assert torch.equal(normed, rms_norm_triton(added, weight, 1e-6))


@pytest.mark.parametrize("width", [5] if INTERPRETED else [173, 1024])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(
    width: int, device: torch.device, generator: torch.Generator
) -> None:
    x, residual = (torch.randn(MOST_ROWS, width, generator=generator).to(device, DTYPE) for _ in "xr")
    weight = torch.randn(width, generator=generator).to(device, DTYPE)

    def normed(part: slice) -> tuple[Tensor, Tensor]:
        return add_rms_norm_triton(among_nan(x[part]), among_nan(residual[part]), weight, 1e-6)

    assert_rows_are_their_own(normed)


def test_a_row_of_nan_or_of_zeros_stays_its_own_affair(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(4, 100, generator=generator).to(device).bfloat16()
    weight = torch.randn(100, generator=generator).to(device).bfloat16()
    before = rms_norm_triton(x, weight, 1e-6)
    x[1], x[2] = torch.nan, 0
    after = rms_norm_triton(x, weight, 1e-6)
    assert torch.equal(after[[0, 3]], before[[0, 3]])
    assert after[1].isnan().all()
    assert (after[2] == 0).all()


def test_heads_of_a_batch_are_rows_and_no_row_is_an_empty_answer(
    device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(3, 4, 10, generator=generator).to(device).bfloat16()
    weight = torch.randn(10, generator=generator).to(device).bfloat16()
    assert torch.equal(rms_norm_triton(x, weight, 1e-6)[1, 2], rms_norm_triton(x[1, 2:3], weight, 1e-6)[0])
    assert torch.equal(rms_norm_triton(x[:, ::2], weight, 1e-6), rms_norm_triton(x, weight, 1e-6)[:, ::2])
    assert rms_norm_triton(x[:0], weight, 1e-6).shape == (0, 4, 10)
