from __future__ import annotations

import pytest
import torch

from engine.logprobs import log_softmax, token_logprob


def rows(count: int, vocabulary: int) -> torch.Tensor:
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 4


@pytest.mark.parametrize("vocabulary", [1, 7, 384, 4099])
def test_logprobs_equal_those_in_float64(vocabulary: int) -> None:
    logits = rows(9, vocabulary)
    expected = torch.log_softmax(logits.double(), dim=-1)
    torch.testing.assert_close(log_softmax(logits).double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [7, 384, 4099])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(vocabulary: int) -> None:
    logits = rows(65, vocabulary)
    whole = log_softmax(logits)
    for count in (1, 2, 7, 32):
        for offset in (0, 1, 30):
            part = slice(offset, offset + count)
            assert torch.equal(log_softmax(logits[part].clone()), whole[part])


def test_the_likeliest_come_best_first_and_ties_by_lowest_id() -> None:
    logprobs = torch.log(torch.tensor([0.2, 0.1, 0.2, 0.4, 0.1])).numpy()
    entry = token_logprob(logprobs, 1, 4)
    assert [token for token, _ in entry.top] == [3, 0, 2, 1]
    assert [value for _, value in entry.top] == [float(logprobs[token]) for token in (3, 0, 2, 1)]
    assert (entry.token, entry.logprob) == (1, float(logprobs[1]))


def test_more_are_asked_for_than_there_are_and_none() -> None:
    logprobs = torch.log_softmax(torch.arange(3.0), dim=-1).numpy()
    assert [token for token, _ in token_logprob(logprobs, 0, 20).top] == [2, 1, 0]
    assert token_logprob(logprobs, 0, 0).top == ()
