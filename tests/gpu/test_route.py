"""Experts chosen, and rows grouped by them: near float64, ties in order, rows that do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.grouped import Groups, group_rows, group_rows_triton
from kernels.jit import INTERPRETED
from kernels.launch import launch_for
from kernels.route import route, route_reference, route_triton
from kernels.shape import ShapeError
from tests.support.batches import MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan

BLOCK = launch_for("grouped", 1, "any").block_n
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
over = pytest.mark.parametrize("over_chosen", [True, False], ids=["over the chosen", "over all"])


@dtypes
@over
@pytest.mark.parametrize(("count", "choices"), [(1, 1), (5, 2), (8, 8), (33, 3), (128, 8), (1000, 32)])
def test_choices_and_weights_equal_the_reference_between_poison(
    count: int, choices: int, over_chosen: bool, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    scores = among_nan(torch.randn(7, count, generator=generator).mul(3).to(device, dtype))
    chosen, weights = route_triton(scores, choices, over_chosen)
    expected = route_reference(scores, choices, over_chosen)
    assert torch.equal(chosen.cpu(), expected[0])
    torch.testing.assert_close(weights.cpu(), expected[1], rtol=4e-6, atol=1e-7)
    plain = route(scores.cpu(), choices, over_chosen)
    assert torch.equal(plain[0], expected[0])
    torch.testing.assert_close(plain[1], expected[1], rtol=4e-6, atol=1e-7)


@over
def test_ties_go_to_the_lowest_expert_and_what_is_ruled_out_comes_last(over_chosen: bool, device: torch.device) -> None:
    lost, none = -torch.inf, torch.nan
    rows = [[1.0, 2, 2, 1, 2], [0.0, -0.0, 0, -0.0, 0], [lost, lost, 3, lost, lost], [-1e38, 1e38, -1e38, 0, 1e38]]
    expected = [[1, 2, 4, 0], [0, 1, 2, 3], [2, 0, 1, 3], [1, 4, 3, 0]]
    scores = torch.tensor(rows, device=device)
    for chosen, weights in (route_triton(scores, 4, over_chosen), route(scores.cpu(), 4, over_chosen)):
        assert chosen.tolist() == expected
        assert weights[2].tolist() == [1, 0, 0, 0]
        assert weights[3].tolist() == [0.5, 0.5, 0, 0]
    poisoned = torch.tensor([[none, 1, none, 2, lost], [none] * 5], device=device)
    for chosen, weights in (route_triton(poisoned, 4, True), route(poisoned.cpu(), 4, True)):
        assert chosen.tolist() == [[3, 1, 4, 0], [0, 1, 2, 3]]
        assert weights.isnan().any(dim=1).all()


@pytest.mark.parametrize(("over_chosen", "rows"), [(True, MOST_ROWS), (False, 20 if INTERPRETED else MOST_ROWS)])
def test_the_bits_of_a_token_do_not_depend_on_the_others(
    over_chosen: bool, rows: int, device: torch.device, generator: torch.Generator
) -> None:
    scores = torch.randn(rows, 5 if INTERPRETED else 60, generator=generator).to(device, torch.bfloat16)
    assert_rows_are_their_own(lambda part: route_triton(among_nan(scores[part]), 2, over_chosen), rows)
    weights = route_triton(scores[:5], 2, over_chosen)[1]
    drowned = torch.full_like(scores[:5], torch.nan)
    drowned[1] = scores[1]
    assert torch.equal(route_triton(drowned, 2, over_chosen)[1][1], weights[1])


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        *((0, 3), (1, 1), (50, 4), (255, 3), (256, 3), (257, 3), (BLOCK, 2), (2048, 3), (2 * BLOCK + 3, 5)),
        (300, 40 if INTERPRETED else 1024),
    ],
)
def test_groups_are_those_of_a_stable_sort(
    rows: int, count: int, device: torch.device, generator: torch.Generator
) -> None:
    of = torch.randint(count + 1, (rows,), generator=generator)
    found, expected = group_rows_triton(of.to(device), count), group_rows(of, count)
    assert torch.equal(found.starts.cpu(), expected.starts)
    assert torch.equal(found.order.cpu(), expected.order)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is the host")
def test_nothing_is_asked_of_the_host(device: torch.device, generator: torch.Generator) -> None:
    scores = torch.randn(500, 60, generator=generator).to(device)

    def grouped() -> tuple[Tensor, Groups]:
        chosen, _ = route(scores, 6)
        return chosen.view(-1), group_rows(chosen.view(-1), 60)

    grouped()  # compiled, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        of, groups = grouped()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(groups.order.cpu(), group_rows(of.cpu(), 60).order)


def test_no_tokens_choose_nothing_and_disagreeing_arguments_are_refused() -> None:
    assert route(torch.zeros(0, 5), 2)[0].shape == route_triton(torch.zeros(0, 5), 2, True)[1].shape == (0, 2)
    with pytest.raises(ShapeError, match="`scores`"):
        route(torch.zeros(5), 2)
    for choices in (0, 6, 33):
        with pytest.raises(ShapeError, match="`choices`"):
            route(torch.zeros(3, 5), choices)
