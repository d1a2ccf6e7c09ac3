from __future__ import annotations

import pytest
import torch

from kernels.linear import TILE_M, Linear, Pack, linear_reference, verify_invariance
from kernels.packed_linear import (
    pack_for_any,
    pack_for_tiles,
    packed_linear,
    packed_linear_pieces,
    packed_linear_tiles,
    packs,
)
from kernels.shape import ShapeError
from tests.support.fresh import drawn

if not packs(torch.bfloat16):
    pytest.skip("this processor packs no weights", allow_module_level=True)

PRODUCTS = {
    "any": (packed_linear, pack_for_any),
    "pieces": (packed_linear_pieces, pack_for_any),
    "pieces_packed_for_32": (packed_linear_pieces, pack_for_tiles),
    "tiles": (packed_linear_tiles, pack_for_tiles),
}
products = pytest.mark.parametrize(("product", "pack"), PRODUCTS.values(), ids=PRODUCTS.keys())


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@products
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("shape", [(67, 173), (64, 64), (384, 1024), (33, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_equals_the_reference_between_poison(
    product: Linear, pack: Pack, rows: int, shape: tuple[int, int], biased: bool, generator: torch.Generator
) -> None:
    x, weight = drawn(generator, rows, shape[1]), drawn(generator, *shape)
    bias = drawn(generator, shape[0]) if biased else None
    found = product(x, pack(weight), bias)
    torch.testing.assert_close(found, linear_reference(x, weight, bias), atol=0.2, rtol=0.01)


@pytest.mark.parametrize("shape", [(64, 64), (33, 173), (384, 1024), (896, 4864)])
def test_tiles_are_invariant_here(shape: tuple[int, int]) -> None:
    assert verify_invariance(packed_linear_tiles, shape, torch.bfloat16, 300, pack=pack_for_tiles)


@products
def test_a_view_of_a_weight_and_rows_from_the_middle_are_multiplied_as_they_stand(product: Linear, pack: Pack) -> None:
    x, weight = draw(3 * TILE_M, 80)[7:40], draw(64, 160)[:, 40:120]
    torch.testing.assert_close(product(x, pack(weight), None), linear_reference(x, weight), atol=0.2, rtol=0.01)


@products
def test_disagreeing_arguments_are_refused(product: Linear, pack: Pack) -> None:
    for x, weight in ((draw(2, 3), draw(4, 5)), (draw(3), draw(4, 3)), (draw(0, 3), draw(4, 3))):
        with pytest.raises(ShapeError, match="`x`"):
            product(x, pack(weight), None)
    with pytest.raises(ShapeError, match="`bias`"):
        product(draw(2, 3), pack(draw(4, 3)), draw(3))


def test_only_bfloat16_is_packed() -> None:
    assert not packs(torch.float32)
    assert not packs(torch.float16)
