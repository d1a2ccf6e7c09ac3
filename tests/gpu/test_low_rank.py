"""What adapters add, many in one batch: near float64, to their own rows alone, alike in bits for any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.grouped import Groups, group_rows
from kernels.low_rank import (
    LowRank,
    LowRankStack,
    add_low_rank_batch,
    add_low_rank_batch_triton,
    add_low_rank_reference,
    stack_low_rank,
)
from kernels.shape import ShapeError
from tests.support.batches import MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan

RANKS = (1, 7, 16, 40)


def draw(generator: torch.Generator, device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return among_nan(torch.randn(*shape, generator=generator).to(device, dtype))


def adapters(
    generator: torch.Generator, device: torch.device, outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16
) -> list[LowRank]:
    return [
        LowRank(
            draw(generator, device, rank, inputs, dtype=dtype) / inputs**0.5,
            draw(generator, device, outputs, rank, dtype=dtype),
        )
        for rank in RANKS
    ]


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"),
    [(1, 3, torch.bfloat16), (67, 173, torch.bfloat16), (96, 300, torch.bfloat16), (67, 173, torch.float16)],
)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_is_added_equals_the_reference_adapter_by_adapter(
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    rows: int,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    loaded = adapters(generator, device, outputs, inputs, dtype)
    product, x = (draw(generator, device, rows, size, dtype=dtype) for size in (outputs, inputs))
    of = torch.randint(len(loaded) + 1, (rows,), generator=generator).to(device)
    expected, before = product.clone(), product.clone()
    for index, adapter in enumerate(loaded):
        if bool((of == index).any()):
            add_low_rank_reference(expected, x, (of == index).nonzero().squeeze(1), adapter)
    add_low_rank_batch_triton(product, x, group_rows(of, len(loaded)), stack_low_rank(loaded))
    torch.testing.assert_close(product, expected, atol=0.06, rtol=0.02)
    none = of == len(loaded)
    assert torch.equal(product[none], before[none])


def test_the_bits_of_a_row_do_not_depend_on_the_others_nor_on_their_adapters(
    device: torch.device, generator: torch.Generator
) -> None:
    stack = stack_low_rank(adapters(generator, device, 20, 150))
    product, x = draw(generator, device, MOST_ROWS, 20), draw(generator, device, MOST_ROWS, 150)
    of = torch.randint(len(RANKS) + 1, (MOST_ROWS,), generator=generator).to(device)

    def added(part: slice) -> list[Tensor]:
        own = among_nan(product[part])
        add_low_rank_batch_triton(own, among_nan(x[part]), group_rows(of[part], len(RANKS)), stack)
        return [own]

    assert_rows_are_their_own(added)


def test_a_rank_filled_up_with_zeros_adds_the_same_bits(device: torch.device, generator: torch.Generator) -> None:
    small, *_, large = adapters(generator, device, 40, 150)
    product, x = draw(generator, device, 20, 40), draw(generator, device, 20, 150)
    first = group_rows(torch.zeros(20, dtype=torch.int64, device=device), 2)
    alone, beside = product.clone(), product.clone()
    add_low_rank_batch_triton(alone, x, Groups(first.order, first.starts[:2]), stack_low_rank([small]))
    add_low_rank_batch_triton(beside, x, first, stack_low_rank([small, large]))
    assert torch.equal(alone, beside)


def test_without_a_gpu_the_plain_version_does_it(generator: torch.Generator) -> None:
    cpu = torch.device("cpu")
    loaded = adapters(generator, cpu, 30, 60)
    product, x = draw(generator, cpu, 25, 30), draw(generator, cpu, 25, 60)
    groups, expected = group_rows(torch.arange(25) % 5, 4), product.clone()
    for index, adapter in enumerate(loaded):
        add_low_rank_reference(expected, x, torch.arange(index, 25, 5), adapter)
    before = product.clone()
    add_low_rank_batch(product, x, groups, stack_low_rank(loaded))
    torch.testing.assert_close(product, expected, atol=0.06, rtol=0.02)
    assert torch.equal(product[4::5], before[4::5])


def test_disagreeing_arguments_are_refused() -> None:
    product, x = torch.zeros(4, 6).bfloat16(), torch.zeros(4, 8).bfloat16()
    stack = LowRankStack(torch.zeros(2, 3, 8).bfloat16(), torch.zeros(2, 6, 3).bfloat16())
    groups = group_rows(torch.tensor([0, 1, 1, 0]), 2)
    for name, call in {
        "product": lambda: add_low_rank_batch(product[:3], x, groups, stack),
        "stack.down": lambda: add_low_rank_batch(product, x[:, :7], groups, stack),
        "stack.up": lambda: add_low_rank_batch(product, x, groups, LowRankStack(stack.down, stack.up[..., :2])),
        "groups": lambda: add_low_rank_batch(product[:3], x[:3], groups, stack),
    }.items():
        with pytest.raises(ShapeError, match=f"`{name}`"):
            call()
    with pytest.raises(ShapeError, match="`product` is not contiguous"):
        add_low_rank_batch_triton(torch.zeros(6, 4).bfloat16().T, x, groups, stack)
    with pytest.raises(ShapeError, match=r"`stack.down`"):
        add_low_rank_batch(product, x, groups, LowRankStack(stack.down[0], stack.up))
