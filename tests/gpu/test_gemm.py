"""The product by its kernel: right between poison, alike in bits for every number of rows, and its epilogues exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.gemm import (
    columns_of,
    gemm,
    gemm_one_tile,
    gemm_reference,
    gemm_silu_mul,
    gemm_silu_mul_one_tile,
    gemm_silu_mul_reference,
)
from kernels.jit import INTERPRETED
from kernels.launch import TABLE, launch_for
from kernels.linear import Linear, linear_by_rows, verify_invariance
from kernels.shape import ShapeError
from kernels.silu_mul import silu_mul_triton
from tests.support.batches import MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 1), (17, 100), (33, 129), (131, 600)]  # N, K
ROWS = [1, 17, 65]
LAUNCHES = sorted({entry.launch for entry in TABLE if entry.operation == "gemm"}, key=lambda launch: launch.block_m)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def draw(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return among_nan(torch.randn(*shape, generator=generator).to(device, dtype))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within a rounding of the dtype: of the element, or of what is usual where it came out small."""
    torch.testing.assert_close(
        found, expected, rtol=TOLERANCE[found.dtype], atol=1e-5 * float(expected.abs().max()) + 1e-6
    )


@dtypes
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_equals_the_reference_between_poison(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    width, depth = shape
    x, weight = draw(generator, device, dtype, rows, depth), draw(generator, device, dtype, width, depth)
    for bias in (None, draw(generator, device, dtype, width)):
        assert_near(gemm(x, weight, bias), gemm_reference(x, weight, bias))


def test_every_tile_of_the_table_gives_a_row_the_same_bits(device: torch.device, generator: torch.Generator) -> None:
    rows, width, depth = (70, 40, 300) if INTERPRETED else (300, 1024, 4096)
    x, weight = (
        draw(generator, device, torch.bfloat16, rows, depth),
        draw(generator, device, torch.bfloat16, width, depth),
    )
    plain = [gemm(x, weight, None, launch) for launch in LAUNCHES]
    gated = [gemm_silu_mul(x, weight, launch) for launch in LAUNCHES]
    for launch, one, other in zip(LAUNCHES, plain, gated, strict=True):
        assert torch.equal(one, plain[0]), f"{launch.block_m} rows"
        assert torch.equal(other, gated[0]), f"{launch.block_m} rows, gated"


@pytest.mark.parametrize(
    ("plain", "gated"),
    [(gemm, gemm_silu_mul), (gemm_one_tile, gemm_silu_mul_one_tile)],
    ids=["by the table", "one tile"],
)
def test_the_bits_of_a_row_do_not_depend_on_how_many_there_are_and_where(
    plain: Linear, gated: Callable[[Tensor, Tensor], Tensor], device: torch.device, generator: torch.Generator
) -> None:
    """Of a product with its bias, and of one that gates: more than a step of K, and more than a tile of columns. The
    second half of K takes off what the first adds up: what is left is what was rounded, and where."""
    x, weight = (draw(generator, device, torch.bfloat16, rows, 100) for rows in (MOST_ROWS, 34))
    x, weight = torch.cat((x, -x.flip(1)), dim=1), torch.cat((weight, weight.flip(1)), dim=1)
    bias = draw(generator, device, torch.bfloat16, 34) / 2**17  # as small as that
    assert_rows_are_their_own(lambda part: (plain(among_nan(x[part]), weight, bias), gated(among_nan(x[part]), weight)))


def test_a_row_keeps_its_bits_among_rows_of_nan(device: torch.device, generator: torch.Generator) -> None:
    x, weight = draw(generator, device, torch.bfloat16, 40, 200), draw(generator, device, torch.bfloat16, 50, 200)
    alone = gemm(x[7:8], weight)
    poisoned = torch.full_like(x, torch.nan)
    poisoned[7] = x[7]
    assert torch.equal(gemm(poisoned, weight)[7:8], alone)


@dtypes
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("shape", [(1, 3), (67, 200)], ids=str)
def test_the_gate_on_the_way_out_is_the_gate_afterwards_to_the_bit(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    width, depth = shape
    x, gate_up = draw(generator, device, dtype, rows, depth), draw(generator, device, dtype, 2 * width, depth)
    gate_up /= depth**0.5
    fused = gemm_silu_mul(x, gate_up)
    assert torch.equal(fused, silu_mul_triton(gemm(x, gate_up)))
    expected = gemm_silu_mul_reference(x, gate_up)
    torch.testing.assert_close(fused, expected, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_the_whole_table_walks_k_in_one_step() -> None:
    assert len({launch.block_k for launch in LAUNCHES}) == 1
    assert [launch.block_m for launch in LAUNCHES] == [16, 32, 64, 128]


@pytest.mark.parametrize("width", [16, 1024, 4096, 151_936])
def test_columns_are_divided_until_the_gpu_is_full(width: int) -> None:
    launch = launch_for("gemm", 64, "any")
    block = columns_of(launch, width, 1)
    assert block == 16 or -(-width // block) >= 128 or block == launch.block_n
    assert columns_of(launch, width, 1, silu=True) <= launch.block_n // 2


def test_disagreeing_arguments_are_refused(device: torch.device) -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device, dtype=torch.bfloat16)

    for x, weight in ((zeros(2, 3), zeros(4, 5)), (zeros(3), zeros(4, 3)), (zeros(0, 3), zeros(4, 3))):
        with pytest.raises(ShapeError, match="`x`"):
            gemm(x, weight)
    for x, weight in ((zeros(2, 3).float(), zeros(4, 3)), (zeros(2, 3).float(), zeros(4, 3).float())):
        with pytest.raises(ShapeError, match="16"):
            gemm(x, weight)
    with pytest.raises(ShapeError, match="`bias`"):
        gemm(zeros(2, 3), zeros(4, 3), zeros(3))
    with pytest.raises(ShapeError, match="`gate_up`"):
        gemm_silu_mul(zeros(2, 3), zeros(5, 3))


def test_start_up_finds_the_product_invariant(device: torch.device) -> None:
    assert verify_invariance(gemm, (16, 173), torch.bfloat16, MOST_ROWS, device.type)


def test_few_rows_go_to_our_own_product_and_many_to_the_library(
    device: torch.device, generator: torch.Generator
) -> None:
    x, weight = draw(generator, device, torch.bfloat16, 65, 96), draw(generator, device, torch.bfloat16, 48, 96)
    assert torch.equal(linear_by_rows(x[:64], weight), gemm(x[:64], weight))
    assert_near(linear_by_rows(x, weight), gemm_reference(x, weight))
    with pytest.raises(ShapeError, match="`x`"):
        linear_by_rows(x[:0], weight)


def test_tiles_of_one_size_equal_the_reference_between_poison(device: torch.device, generator: torch.Generator) -> None:
    rows = 65 if INTERPRETED else MOST_ROWS
    x, weight = draw(generator, device, torch.bfloat16, rows, 96), draw(generator, device, torch.bfloat16, 48, 96)
    bias = weight[:, 0].contiguous()
    assert_near(gemm_one_tile(x, weight, bias), gemm_reference(x, weight, bias))
    assert_near(gemm_silu_mul_one_tile(x, weight), gemm_silu_mul_reference(x, weight))
