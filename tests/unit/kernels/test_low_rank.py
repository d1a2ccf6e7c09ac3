"""What an adapter adds: right, to its own rows alone, and in bits that the number and place of them do not change."""

from __future__ import annotations

import pytest
import torch

from kernels.low_rank import LowRank, add_low_rank, add_low_rank_reference
from kernels.shape import ShapeError

COUNTS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 129, 256, 257)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def adapter_of(outputs: int, inputs: int, rank: int) -> LowRank:
    return LowRank(draw(rank, inputs) / inputs**0.5, draw(outputs, rank, seed=1))


def added(product: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None, adapter: LowRank) -> torch.Tensor:
    changed = product.clone()
    add_low_rank(changed, x, rows, adapter)
    return changed


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(67, 173, 1), (96, 64, 3), (33, 512, 48)])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_what_is_added_equals_the_reference(outputs: int, inputs: int, rank: int, tokens: int) -> None:
    product, x, adapter = draw(tokens, outputs), draw(tokens, inputs), adapter_of(outputs, inputs, rank)
    for rows in (None, torch.arange(0, tokens, 2)):
        expected = product.clone()
        add_low_rank_reference(expected, x, rows, adapter)
        torch.testing.assert_close(added(product, x, rows, adapter), expected, atol=0.06, rtol=0.02)


@pytest.mark.parametrize("inputs", [64, 896])  # of the wider one the library's own product is not invariant with AMX
def test_bits_of_a_row_do_not_depend_on_how_many_there_are_and_where(inputs: int) -> None:
    adapter = adapter_of(160, inputs, 48)
    product, x = draw(300, 160), draw(300, inputs)
    whole = added(product, x, None, adapter)
    generator = torch.Generator().manual_seed(3)
    for count in COUNTS:
        rows = torch.randperm(300, generator=generator)[:count].sort().values
        mixed = added(product, x, rows, adapter)
        assert torch.equal(mixed[rows], whole[rows])
        own = added(product[rows], x[rows], None, adapter)
        assert torch.equal(own, whole[rows])


def test_rows_of_others_keep_their_bits_whatever_stands_in_them() -> None:
    product, x, adapter = draw(40, 32), draw(40, 64), adapter_of(32, 64, 4)
    others = torch.arange(40) % 3 != 0
    product[0::3], x[1::3] = -0.0, float("nan")
    mixed = added(product, x, torch.arange(0, 40, 3), adapter)
    assert torch.equal(mixed[others].view(torch.int16), product[others].view(torch.int16))
    assert not mixed[0::3].isnan().any()


def test_disagreeing_arguments_are_refused() -> None:
    product, x, adapter = draw(4, 32), draw(4, 64), adapter_of(32, 64, 4)
    for wrong in (draw(3, 64), draw(4, 63), draw(4)):
        with pytest.raises(ShapeError):
            add_low_rank(product, wrong, None, adapter)
    with pytest.raises(ShapeError, match="`adapter`"):
        add_low_rank(product, x, None, LowRank(adapter.down[:3], adapter.up))
    for rows in (torch.arange(5), torch.arange(0), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(ShapeError, match="`rows`"):
            add_low_rank(product, x, rows, adapter)
