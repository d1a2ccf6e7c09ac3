from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from kernels.linear import linear_reference, verify_invariance
from kernels.shape import ShapeError

pytest.importorskip("numba")

from kernels import tile_linear as kernel
from kernels.lane_silu_mul import lane_silu_mul
from kernels.tile_linear import HELD, PAIR, lay_out

Product = Callable[..., torch.Tensor]


@pytest.fixture
def tile_linear(by_tiles: bool) -> Product:
    return partial(kernel.tile_linear, tiles=by_tiles)


@pytest.fixture
def tile_silu_mul(by_tiles: bool) -> Product:
    return partial(kernel.tile_silu_mul, tiles=by_tiles)


UGLY = [(67, 173), (33, 8), (1, 1), (32, 33), (48, 31), (95, 688), (64, 64)]
ROWS = [*range(1, 71), 129, 257]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("shape", UGLY)
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_equals_the_reference_at_ugly_sizes(
    tile_linear: Product, shape: tuple[int, int], biased: bool
) -> None:
    weight, bias = draw(*shape), draw(shape[0]) if biased else None
    laid_out = lay_out(weight)
    assert laid_out.shape == shape
    for rows in ROWS:
        x = draw(rows, shape[1])
        found = tile_linear(x, laid_out, bias)
        torch.testing.assert_close(found, linear_reference(x, weight, bias), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("shape", [(67, 173), (384, 1024), (96, 4864)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_among_others(
    tile_linear: Product, shape: tuple[int, int], threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert verify_invariance(tile_linear, shape, torch.bfloat16, 600, pack=lay_out)
    finally:
        torch.set_num_threads(before)


def test_more_rows_than_are_laid_out_at_a_time_have_the_bits_of_each_alone(tile_linear: Product) -> None:
    depth = 4864
    rows = HELD // (depth * 2) // PAIR * PAIR * 2 + 5
    x, weight, bias = draw(rows, depth), lay_out(draw(40, depth)), draw(40)
    assert rows * depth * 2 > HELD
    alone = torch.cat([tile_linear(row, weight, bias) for row in torch.split(x, 1)])
    assert torch.equal(tile_linear(x, weight, bias).view(torch.int16), alone.view(torch.int16))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_no_bit(tile_linear: Product, threads: int) -> None:
    x, weight, bias = draw(70, 173), lay_out(draw(131, 173)), draw(131)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = tile_linear(x, weight, bias)
    torch.set_num_threads(threads)
    try:
        shared = tile_linear(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shared.view(torch.int16), alone.view(torch.int16))


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 31, 33, 50])
def test_nothing_beside_the_arguments_is_read_into_the_result(tile_linear: Product, rows: int) -> None:
    around = torch.full((rows + 40, 45), torch.nan, dtype=torch.bfloat16)
    around[20 : 20 + rows] = draw(rows, 45)
    biases = torch.full((90,), torch.nan, dtype=torch.bfloat16)
    biases[30:67] = draw(37)
    weights = torch.full((60, 70), torch.nan, dtype=torch.bfloat16)
    weights[10:47, 12:57] = draw(37, 45)
    x, weight, bias = around[20 : 20 + rows], weights[10:47, 12:57], biases[30:67]
    found = tile_linear(x, lay_out(weight), bias)
    torch.testing.assert_close(found, linear_reference(x, weight, bias), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("shape", [(128, 45), (64, 96), (96, 33), (192, 4864)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_gate_has_the_bits_of_its_two_steps(
    tile_linear: Product, tile_silu_mul: Product, shape: tuple[int, int], threads: int
) -> None:
    weight = lay_out(draw(*shape))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 16, 17, 33, 70, 129):
            x = draw(rows, shape[1])
            apart = lane_silu_mul(tile_linear(x, weight))
            assert torch.equal(tile_silu_mul(x, weight).view(torch.int16), apart.view(torch.int16))
    finally:
        torch.set_num_threads(before)


def test_a_row_that_is_no_number_leaves_its_neighbours_alone(tile_linear: Product) -> None:
    x, weight = draw(33, 96), lay_out(draw(64, 96))
    whole = tile_linear(x, weight)
    poisoned = x.clone()
    poisoned[7], poisoned[32] = torch.nan, torch.inf
    found = tile_linear(poisoned, weight)
    others = [row for row in range(33) if row not in (7, 32)]
    assert torch.equal(found[others], whole[others])
    assert not found[[7, 32]].isfinite().any()


def test_rows_that_do_not_lie_side_by_side_are_multiplied_as_they_stand(tile_linear: Product) -> None:
    x, weight = draw(40, 160)[3:30, 40:120], draw(64, 80)
    found = tile_linear(x, lay_out(weight))
    torch.testing.assert_close(found, linear_reference(x, weight), atol=0.02, rtol=0.01)


def test_products_of_a_library_beside_keep_their_tiles(tile_linear: Product) -> None:
    x, weight = draw(64, 96), draw(64, 96)
    before = torch.nn.functional.linear(x, weight)
    tile_linear(x, lay_out(weight))
    assert torch.equal(torch.nn.functional.linear(x, weight), before)


def test_disagreeing_arguments_are_refused(tile_linear: Product, tile_silu_mul: Product) -> None:
    for x, weight in ((draw(2, 3), draw(64, 5)), (draw(3), draw(64, 3)), (draw(0, 3), draw(64, 3))):
        for product in (tile_linear, tile_silu_mul):
            with pytest.raises(ShapeError, match="`x`"):
                product(x, lay_out(weight))
    with pytest.raises(ShapeError, match="`bias`"):
        tile_linear(draw(2, 3), lay_out(draw(4, 3)), draw(3))


def test_only_bfloat16_is_multiplied(tile_linear: Product, tile_silu_mul: Product) -> None:
    with pytest.raises(ShapeError, match="`weight`"):
        lay_out(draw(4, 3).float())
    with pytest.raises(ShapeError, match="`x`"):
        tile_linear(draw(2, 3).float(), lay_out(draw(4, 3)))
    with pytest.raises(ShapeError, match="`x`"):
        tile_silu_mul(draw(2, 3).float(), lay_out(draw(64, 3)))
    with pytest.raises(ShapeError, match="`bias`"):
        tile_linear(draw(2, 3), lay_out(draw(4, 3)), draw(4).float())
