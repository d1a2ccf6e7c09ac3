"""Rows by the matrix of their group: what `gemm` gives for each to the bit, wherever they lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.gemm import gemm, gemm_silu_mul
from kernels.grouped import Groups, group_rows, grouped_product, grouped_product_reference, grouped_product_triton
from kernels.shape import ShapeError
from tests.support.poison import among_nan

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def draw(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return among_nan(torch.randn(*shape, generator=generator).to(device, dtype))


def owners(generator: torch.Generator, rows: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(count, (rows,), generator=generator).to(device)


@dtypes
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (7, 3), (40, 3), (20, 17), (150, 2)])
def test_every_row_is_what_the_product_with_its_groups_matrix_gives(
    rows: int, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    x, weight = draw(generator, device, dtype, rows, 100), draw(generator, device, dtype, count, 34, 100)
    of = owners(generator, rows, count, device)
    groups = group_rows(of, count)
    out, gated = x.new_full((rows, 34), torch.nan), x.new_full((rows, 17), torch.nan)
    grouped_product_triton(x, weight, groups, out)
    grouped_product_triton(x, weight, groups, gated, silu=True)
    for row in range(0, rows, 1 + rows // 4):
        assert torch.equal(out[row : row + 1], gemm(x[row : row + 1], weight[of[row]]))
        assert torch.equal(gated[row : row + 1], gemm_silu_mul(x[row : row + 1], weight[of[row]]))
    expected = grouped_product_reference(x, weight, groups)
    torch.testing.assert_close(out[groups.order], expected, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("sizes", [[0, 0, 16, 0], [17, 0, 1, 33], [0, 0, 0, 0], [64, 65, 0, 0], [1, 1, 1, 1]])
def test_groups_of_every_size_are_found_and_rows_of_none_are_left_alone(
    sizes: list[int], device: torch.device, generator: torch.Generator
) -> None:
    rows = sum(sizes) + 5
    of = torch.cat([torch.full((size,), group) for group, size in enumerate([*sizes, 5])])
    of = of[torch.randperm(rows, generator=generator)].to(device)
    x, weight = draw(generator, device, torch.bfloat16, rows, 40), draw(generator, device, torch.bfloat16, 4, 20, 40)
    x[of == 4] = torch.nan
    groups = group_rows(of, 4)
    out = x.new_full((rows, 20), 7.0)
    grouped_product_triton(x, weight, groups, out)
    assert bool((out[of == 4] == 7).all())
    belong = groups.order[: sum(sizes)]
    torch.testing.assert_close(out[belong], grouped_product_reference(x, weight, groups), rtol=2**-7, atol=1e-4)


def test_adding_is_the_product_and_then_a_sum_to_the_bit(device: torch.device, generator: torch.Generator) -> None:
    x, weight = draw(generator, device, torch.bfloat16, 50, 65), draw(generator, device, torch.bfloat16, 3, 33, 65)
    held = draw(generator, device, torch.bfloat16, 50, 33)
    groups = group_rows(owners(generator, 50, 4, device), 3)
    product, added = torch.zeros_like(held), held.clone()
    grouped_product_triton(x, weight, groups, product)
    grouped_product_triton(x, weight, groups, added, add=True)
    assert torch.equal(added, (held.float() + product.float()).bfloat16())


def test_the_choices_of_a_row_read_that_row(device: torch.device, generator: torch.Generator) -> None:
    x, weight = draw(generator, device, torch.bfloat16, 9, 40), draw(generator, device, torch.bfloat16, 5, 20, 40)
    of = owners(generator, 27, 5, device)
    out = x.new_full((27, 20), torch.nan)
    grouped_product_triton(x, weight, group_rows(of, 5), out, choices=3)
    repeated = torch.full_like(out, torch.nan)
    grouped_product_triton(x.repeat_interleave(3, dim=0), weight, group_rows(of, 5), repeated)
    assert torch.equal(out, repeated)


def test_rows_of_a_group_ascend() -> None:
    groups = group_rows(torch.tensor([2, 0, 3, 2, 0, 2]), 3)
    assert groups.order.tolist() == [1, 4, 0, 3, 5, 2]
    assert groups.starts.tolist() == [0, 2, 2, 5]


def test_without_a_gpu_the_plain_version_does_it(generator: torch.Generator) -> None:
    cpu = torch.device("cpu")
    x, weight = draw(generator, cpu, torch.bfloat16, 20, 40), draw(generator, cpu, torch.bfloat16, 3, 20, 40)
    groups = group_rows(owners(generator, 40, 3, cpu), 3)
    out = x.new_zeros(40, 20)
    grouped_product(x, weight, groups, out, choices=2)
    torch.testing.assert_close(out[groups.order], grouped_product_reference(x, weight, groups, 2), rtol=0.02, atol=0.02)
    held = out.clone()
    grouped_product(x, weight, groups, out, choices=2, add=True)
    assert torch.equal(out, held + held)


def test_disagreeing_arguments_are_refused() -> None:
    x, weight, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((4, 8), (2, 6, 8), (4, 6)))
    groups = group_rows(torch.tensor([0, 1, 1, 0]), 2)
    for name, call in {
        "weight": lambda: grouped_product(x, weight[:1], groups, out),
        "x": lambda: grouped_product(x[0], weight, groups, out),
        "out": lambda: grouped_product(x, weight.float(), groups, out),
        "groups": lambda: grouped_product(x[:3], weight, groups, out),
    }.items():
        with pytest.raises(ShapeError, match=f"`{name}`"):
            call()
    with pytest.raises(ShapeError, match="`out` is not contiguous"):
        grouped_product_triton(x, weight, groups, torch.zeros(6, 4).bfloat16().T)
    with pytest.raises(ShapeError, match="`starts` holds"):
        grouped_product_triton(x, weight, Groups(groups.order, groups.starts.long()), out)
    with pytest.raises(ShapeError, match="0 groups"):
        grouped_product(x, weight[:0], Groups(groups.order, groups.starts[:1]), out)
