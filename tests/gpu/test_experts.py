"""A mixture of experts by its kernels: near float64, summed in one order, tokens that do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.experts import combine, combine_triton, experts, experts_reference
from kernels.grouped import group_rows, grouped_product_triton
from kernels.shape import ShapeError
from tests.support.batches import DTYPE, MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan


def by_kernels(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What `experts` does on a GPU, in the interpreter too."""
    groups = group_rows(chosen.reshape(-1), gate_up.shape[0])
    inner = x.new_full((chosen.numel(), down.shape[2]), torch.nan)
    outer = x.new_full((chosen.numel(), x.shape[1]), torch.nan)
    grouped_product_triton(x, gate_up, groups, inner, chosen.shape[1], silu=True)
    grouped_product_triton(inner, down, groups, outer)
    return combine_triton(outer.view(*chosen.shape, -1), weights)


class Mixture:
    """Weights at random, and tokens with their choices."""

    def __init__(
        self,
        generator: torch.Generator,
        device: torch.device,
        count: int,
        hidden: int,
        inner: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return among_nan((torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype))

        self.gate_up, self.down = draw(count, 2 * inner, hidden), draw(count, hidden, inner)
        self.generator, self.device, self.count, self.hidden, self.dtype = generator, device, count, hidden, dtype

    def tokens(self, rows: int, choices: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(rows, self.hidden, generator=self.generator).mul(2).to(self.device, self.dtype)
        chosen = torch.rand(rows, self.count, generator=self.generator).argsort(dim=1)[:, :choices]
        weights = torch.rand(rows, choices, generator=self.generator).softmax(-1)
        return among_nan(x), chosen.to(self.device), among_nan(weights.to(self.device))


@pytest.mark.parametrize(
    ("count", "choices", "dtype"),
    [(1, 1, torch.bfloat16), (3, 2, torch.bfloat16), (12, 3, torch.bfloat16), (3, 2, torch.float16)],
)
@pytest.mark.parametrize("rows", [1, 29])
def test_they_equal_the_reference_between_poison(
    count: int, choices: int, dtype: torch.dtype, rows: int, device: torch.device, generator: torch.Generator
) -> None:
    mixture = Mixture(generator, device, count, 50, 33, dtype)
    x, chosen, weights = mixture.tokens(rows, choices)
    found = by_kernels(x, mixture.gate_up, mixture.down, chosen, weights)
    expected = experts_reference(x, mixture.gate_up, mixture.down, chosen, weights)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_the_bits_of_a_token_do_not_depend_on_the_others_nor_on_their_choices(
    device: torch.device, generator: torch.Generator
) -> None:
    mixture = Mixture(generator, device, 3, 34, 17, DTYPE)  # more than a tile of columns each
    x, chosen, weights = mixture.tokens(MOST_ROWS, 2)

    def computed(part: slice) -> list[Tensor]:
        own = among_nan(x[part]), mixture.gate_up, mixture.down, chosen[part], among_nan(weights[part])
        return [by_kernels(*own)]

    assert_rows_are_their_own(computed)


@pytest.mark.parametrize("width", [1, 100, 1025])
def test_outputs_are_added_in_the_order_of_the_choices_to_the_bit(
    width: int, device: torch.device, generator: torch.Generator
) -> None:
    outputs = among_nan(torch.randn(5, 8, width, generator=generator).mul(100).to(device, torch.bfloat16))
    weights = among_nan(torch.rand(5, 8, generator=generator).to(device))
    outputs[:, 4:], weights[:, 4:] = -outputs[:, :4], weights[:, :4]  # what is left is what was rounded, and where
    assert torch.equal(combine_triton(outputs, weights), combine(outputs, weights))


def test_without_a_gpu_the_plain_version_does_it(generator: torch.Generator) -> None:
    mixture = Mixture(generator, torch.device("cpu"), 5, 48, 32)
    x, chosen, weights = mixture.tokens(21, 3)
    found = experts(x, mixture.gate_up, mixture.down, chosen, weights)
    expected = experts_reference(x, mixture.gate_up, mixture.down, chosen, weights)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)
    alone = experts(x[4:5], mixture.gate_up, mixture.down, chosen[4:5], weights[4:5])
    assert torch.equal(alone, found[4:5])
    assert experts(x[:0], mixture.gate_up, mixture.down, chosen[:0], weights[:0]).shape == (0, 48)


def test_disagreeing_arguments_are_refused() -> None:
    x, gate_up, down = (torch.zeros(shape).bfloat16() for shape in ((4, 8), (3, 10, 8), (3, 8, 5)))
    chosen, weights = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)
    for name, call in {
        "x": lambda: experts(x[0], gate_up, down, chosen, weights),
        "down": lambda: experts(x[:, :7], gate_up, down, chosen, weights),
        "gate_up": lambda: experts(x, gate_up[:2], down, chosen, weights),
        "chosen": lambda: experts(x, gate_up, down, chosen[:3], weights),
        "weights": lambda: experts(x, gate_up, down, chosen, weights[:, :1]),
    }.items():
        with pytest.raises(ShapeError, match=f"`{name}`"):
            call()
    with pytest.raises(ShapeError, match="`weights` holds"):
        experts(x, gate_up, down, chosen, weights.double())
