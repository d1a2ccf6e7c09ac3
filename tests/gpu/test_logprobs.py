"""Log-probabilities by their kernels: near float64, the likeliest in order, rows that do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.jit import INTERPRETED
from kernels.launch import launch_for
from kernels.logprobs import logprobs, logprobs_reference, logprobs_triton
from kernels.shape import ShapeError
from tests.support.batches import MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan

BLOCK = launch_for("logprobs", 1, "any").block_n
WIDTHS = [1, 2, 33, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]


def drawn(rows: int, width: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    logits = among_nan(torch.randn(rows, width, generator=generator).mul(4).to(device))
    return logits, torch.randint(width, (rows,), generator=generator).to(device)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("alternatives", [0, 1, 5, 20])
def test_they_equal_the_reference_between_poison(
    width: int, alternatives: int, device: torch.device, generator: torch.Generator
) -> None:
    alternatives = min(alternatives, width)
    logits, tokens = drawn(3, width, generator, device)
    found, expected = logprobs_triton(logits, tokens, alternatives), logprobs_reference(logits, tokens, alternatives)
    torch.testing.assert_close(found.selected.cpu(), expected.selected, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(found.top.cpu(), expected.top, rtol=1e-6, atol=4e-6)
    assert torch.equal(found.top_ids.cpu(), expected.top_ids)


def test_a_token_has_the_same_bits_among_the_likeliest_as_when_it_is_asked_for(
    device: torch.device, generator: torch.Generator
) -> None:
    logits, _ = drawn(4, BLOCK + 77, generator, device)
    found = logprobs_triton(logits, logits.argmax(-1), 20)
    assert torch.equal(found.top[:, 0], found.selected)
    assert torch.equal(logprobs_triton(logits, logits.argmax(-1), 0).selected, found.selected)
    assert torch.equal(logprobs_triton(logits, found.top_ids[:, 19].long(), 1).selected, found.top[:, 19])


def test_ties_go_to_the_lowest_id_over_all_parts(device: torch.device) -> None:
    logits = torch.zeros(2, 2 * BLOCK + 5, device=device)
    logits[1, [7, BLOCK + 3, 2 * BLOCK + 4]] = 1
    found = logprobs_triton(logits, torch.zeros(2, dtype=torch.int64, device=device), 5)
    assert found.top_ids.tolist() == [[0, 1, 2, 3, 4], [7, BLOCK + 3, 2 * BLOCK + 4, 0, 1]]


def test_what_is_ruled_out_has_no_probability_and_is_named_last(device: torch.device) -> None:
    logits = torch.full((1, BLOCK + 10), -torch.inf, device=device)
    logits[0, [BLOCK + 5, 3]] = torch.tensor([2.0, 1.0], device=device)
    found = logprobs_triton(logits, torch.tensor([9], device=device), 4)
    assert found.selected.tolist() == [-torch.inf]
    assert found.top_ids.tolist() == [[BLOCK + 5, 3, 0, 1]]
    expected = torch.log_softmax(torch.tensor([2.0, 1.0]), 0)
    torch.testing.assert_close(found.top[0, :2].cpu(), expected)
    assert found.top[0, 2:].tolist() == [-torch.inf, -torch.inf]


def test_large_and_small_logits_do_not_overflow(device: torch.device) -> None:
    logits = torch.tensor([[1.5e38, 1.5e38, -1.5e38], [-3e38, -3e38, -3e38]], device=device)
    found = logprobs_triton(logits, torch.tensor([0, 2], device=device), 0)
    torch.testing.assert_close(found.selected.cpu(), -torch.tensor([2.0, 3.0]).log())


@pytest.mark.parametrize(("width", "rows"), [(7, MOST_ROWS), (2 * BLOCK + 1, 20 if INTERPRETED else MOST_ROWS)])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(
    width: int, rows: int, device: torch.device, generator: torch.Generator
) -> None:
    logits, tokens = drawn(rows, width, generator, device)
    alternatives = 1 if INTERPRETED else 3

    def found(part: slice) -> tuple[Tensor, ...]:
        one = logprobs_triton(among_nan(logits[part]), tokens[part], alternatives)
        return one.selected, one.top_ids, one.top

    assert_rows_are_their_own(found, rows)


def test_a_row_keeps_its_bits_among_rows_far_above_it(device: torch.device, generator: torch.Generator) -> None:
    logits, tokens = drawn(5, 300, generator, device)
    whole = logprobs_triton(logits, tokens, 0)
    drowned = torch.full_like(logits, 1e30)
    drowned[1] = logits[1]
    assert logprobs_triton(drowned, tokens, 0).selected[1] == whole.selected[1]


def test_no_rows_are_no_answer_and_without_a_gpu_the_plain_version_gives_it(generator: torch.Generator) -> None:
    cpu = torch.device("cpu")
    logits, tokens = drawn(5, 100, generator, cpu)
    found, expected = logprobs(logits, tokens, 7), logprobs_reference(logits, tokens, 7)
    torch.testing.assert_close(found.top, expected.top)
    assert torch.equal(found.selected, torch.log_softmax(logits, -1)[torch.arange(5), tokens])
    assert torch.equal(found.top_ids, expected.top_ids)
    assert logprobs_triton(logits[:0], tokens[:0], 7).top.shape == (0, 7)


def test_disagreeing_arguments_are_refused() -> None:
    logits, tokens = torch.zeros(2, 40), torch.zeros(2, dtype=torch.int64)
    for refused in (logits.double(), logits[0], logits[:, :0]):
        with pytest.raises(ShapeError, match="`logits`"):
            logprobs(refused, tokens, 1)
    with pytest.raises(ShapeError, match="`tokens`"):
        logprobs(logits, tokens[:1], 1)
    for count in (-1, 33, 41):
        with pytest.raises(ShapeError, match="`alternatives`"):
            logprobs(logits, tokens, count)
