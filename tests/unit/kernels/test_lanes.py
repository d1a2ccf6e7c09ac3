"""The words that compiled kernels are written in, one by one, at ugly numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from numba import njit

from kernels.lanes import (
    LANES,
    copy_masked,
    fill,
    fused,
    greatest_of,
    only_first,
    power_of_two,
    put_halves,
    put_number,
    put_sixteen,
    rounded,
    sixteen_at,
    sixteen_halves_at,
    sum_of,
)

TIES = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, -1 - 2**-8]  # between two of bfloat16, or nearly
UGLY = torch.tensor(
    [*TIES, 0.0, -0.0, 1.0, 3.3e38, 3.4e38, 1e-38, 1e-40, -1e-45, math.inf, -math.inf, math.nan, 65504.0]
)


@njit
def _rounded(source: int, wide: int, narrow: int, back: int) -> None:
    put_sixteen(wide, rounded(sixteen_at(source)))
    put_halves(narrow, sixteen_at(source))
    put_sixteen(back, sixteen_halves_at(narrow))


def test_rounding_is_that_of_the_library() -> None:
    many = torch.cat((UGLY, torch.randn(16 * 99, generator=torch.Generator().manual_seed(0)) * 1e3))
    for numbers in torch.split(many, LANES):
        numbers = numbers.clone()
        wide, back, narrow = torch.empty(LANES), torch.empty(LANES), torch.empty(LANES, dtype=torch.bfloat16)
        _rounded(*(tensor.data_ptr() for tensor in (numbers, wide, narrow, back)))
        expected = numbers.bfloat16()
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(narrow, expected, **same)
        torch.testing.assert_close(wide, expected.float(), **same)
        torch.testing.assert_close(back, expected.float(), **same)
        assert torch.equal(narrow.signbit() | expected.isnan(), expected.signbit() | expected.isnan())


@njit
def _powers(source: int, to: int) -> None:
    put_sixteen(to, power_of_two(sixteen_at(source)))


def powers(*exponents: float) -> torch.Tensor:
    given, found = torch.tensor([*exponents, *(0.0,) * (LANES - len(exponents))]), torch.empty(LANES)
    _powers(given.data_ptr(), found.data_ptr())
    return found[: len(exponents)]


def test_powers_of_two_are_near_and_exact_where_it_matters() -> None:
    for exponents in torch.split(torch.linspace(-126, 127, 16 * 500, dtype=torch.float64), LANES):
        found = powers(*exponents.tolist()).double()
        exact = torch.exp2(exponents.float().double())
        assert float(((found - exact) / exact).abs().max()) < 2**-21
    whole = [-126.0, -125.0, -1.0, -0.0, 0.0, 1.0, 126.0, 127.0]
    assert powers(*whole).tolist() == [2.0**exponent for exponent in whole]
    assert powers(-126.5, -200.0, -math.inf, -3e38).tolist() == [0.0] * 4
    assert powers(127.5, 200.0, math.inf).tolist() == [math.inf] * 3
    assert bool(powers(math.nan).isnan())


@njit
def _joined(source: int, to: int, count: int) -> None:
    numbers = sixteen_at(source)
    put_number(to, sum_of(numbers))
    put_number(to + 4, greatest_of(numbers))
    put_number(to + 8, greatest_of(only_first(numbers, count)))
    put_sixteen(to + 12, fused(numbers, numbers, fill(np.float32(-1))))


def joined(numbers: torch.Tensor, count: int = LANES) -> list[float]:
    found = torch.empty(3 + LANES)
    _joined(numbers.data_ptr(), found.data_ptr(), count)
    return found.tolist()


def test_lanes_are_joined_in_the_order_that_is_written_down() -> None:
    numbers = torch.randn(LANES, generator=torch.Generator().manual_seed(3)) * 1e3
    halves = numbers
    for distance in (8, 4, 2, 1):
        halves = halves[:distance] + halves[distance : 2 * distance]
    assert joined(numbers)[0] == float(halves)
    assert joined(numbers)[1] == float(numbers.max())


def test_a_fused_product_is_rounded_once() -> None:
    number = 1 + 2**-12
    found = joined(torch.full((LANES,), number))[3]
    assert found == number * number - 1 != float(np.float32(number * number)) - 1


@pytest.mark.parametrize("count", [-5, 0, 1, 7, 16, 40])
def test_lanes_beyond_a_count_are_not_seen(count: int) -> None:
    numbers = torch.arange(LANES).float()
    numbers[max(count, 0) :] = torch.nan if count < LANES else 0
    assert joined(numbers, count)[2] == (-math.inf if count < 1 else min(count, LANES) - 1)


@njit
def _masked(to: int, source: int, mask: int) -> None:
    copy_masked(to, source, mask)


@pytest.mark.parametrize(("mask", "kept"), [(0xFFFFFFFF, 2), (0xFFFF, 1), (0, 0)])
def test_of_pairs_the_second_or_both_are_left_out(mask: int, kept: int) -> None:
    source, to = torch.full((LANES, 2), torch.nan).bfloat16(), torch.ones(LANES, 2).bfloat16()
    source[:, :kept] = 3
    _masked(to.data_ptr(), source.data_ptr(), mask)
    expected: list[Any] = [[3.0] * kept + [0.0] * (2 - kept)] * LANES
    assert to.tolist() == expected
