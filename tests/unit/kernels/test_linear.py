from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.linear import Linear, linear, linear_fixed_tiles, linear_reference, probed_rows, verify_invariance
from kernels.shape import ShapeError
from tests.support.fresh import drawn

ROOT = Path(__file__).parents[3]
FUNCTIONS = [linear, linear_fixed_tiles]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_equals_the_reference_between_poison(
    function: Linear, rows: int, biased: bool, generator: torch.Generator
) -> None:
    x, weight = drawn(generator, rows, 173), drawn(generator, 67, 173)
    bias = drawn(generator, 67) if biased else None
    torch.testing.assert_close(function(x, weight, bias), linear_reference(x, weight, bias), atol=0.1, rtol=0.01)


@pytest.mark.parametrize("shape", [(64, 64), (33, 173), (384, 1024), (896, 4864)])
def test_fixed_tiles_are_invariant_here_even_where_the_library_is_not(shape: tuple[int, int]) -> None:
    assert verify_invariance(linear_fixed_tiles, shape, torch.bfloat16, 600)


def test_a_product_that_depends_on_the_number_of_rows_is_found_out_at_its_widest() -> None:
    def leaning(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear_fixed_tiles(x, weight, bias) + (1 if x.shape[0] > 511 else 0)

    assert verify_invariance(leaning, (8, 16), torch.bfloat16, 500)
    assert not verify_invariance(leaning, (8, 16), torch.bfloat16, 513)


@pytest.mark.parametrize("most", [1, 2, 100, 512, 513, 1000])
def test_the_widest_step_is_probed(most: int) -> None:
    rows = probed_rows(most)
    assert rows[-1] == most
    assert rows[0] == 1
    assert rows == sorted(set(rows))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_disagreeing_arguments_are_refused(function: Linear) -> None:
    for x, weight in ((draw(2, 3), draw(4, 5)), (draw(3), draw(4, 3)), (draw(0, 3), draw(4, 3))):
        with pytest.raises(ShapeError, match="`x`"):
            function(x, weight, None)
    with pytest.raises(ShapeError, match="`bias`"):
        function(draw(2, 3), draw(4, 3), draw(3))


def test_the_library_is_told_not_to_split_k_before_cuda_starts() -> None:
    told = "m.allow_tf32, m.allow_bf16_reduced_precision_reduction, m.allow_bf16_reduced_precision_reduction_split_k"
    program = f"""
import os, torch
from kernels.linear import forbid_split_k
forbid_split_k()
m = torch.backends.cuda.matmul
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["CUBLASLT_WORKSPACE_SIZE"], {told})
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [":16:8", "1", "False", "False", "False"]
