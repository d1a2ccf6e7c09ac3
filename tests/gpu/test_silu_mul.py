"""SiLU · up by its kernel."""

from __future__ import annotations

import pytest
import torch

from kernels.jit import INTERPRETED
from kernels.silu_mul import silu_mul_reference, silu_mul_triton
from tests.support.batches import DTYPE, MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan

TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 3, 173, 1023, 1024, 1025, 3072])
def test_silu_mul_equals_the_reference_between_poison(
    width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    x = among_nan(torch.randn(5, 2 * width, generator=generator).mul(3).to(device, dtype))
    torch.testing.assert_close(silu_mul_triton(x), silu_mul_reference(x), rtol=TOLERANCE[dtype], atol=1e-4)


def test_gates_far_from_zero_open_and_close_for_good(device: torch.device) -> None:
    gate = torch.tensor([-3e4, -100.0, -0.0, 0.0, 100.0, 3e4], device=device).bfloat16()
    x = torch.stack((torch.cat((gate, torch.ones_like(gate))), torch.cat((gate, gate.new_full((6,), -2.0)))))
    expected = gate.clamp(min=0)
    torch.testing.assert_close(silu_mul_triton(x), torch.stack((expected, -2 * expected)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "rows"), [(5, MOST_ROWS), (1030, 20 if INTERPRETED else MOST_ROWS)])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(
    width: int, rows: int, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(rows, 2 * width, generator=generator).to(device, DTYPE)
    assert_rows_are_their_own(lambda part: [silu_mul_triton(among_nan(x[part]))], rows)
    assert silu_mul_triton(x[:0]).shape == (0, width)
