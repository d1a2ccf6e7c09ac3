"""A kernel's items are each taken once, by however many threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.team import COME, TAKEN, run, shares, threads_for

pytest.importorskip("numba")

from kernels.compilation import compiled
from kernels.lanes import claim, integer_at, put_integer


def _mark(data: int) -> None:
    """Of every item, count how often it was taken, and say which of the threads that came took it."""
    items, counts, takers = integer_at(data + 16), integer_at(data + 24), integer_at(data + 32)
    mine = claim(data + COME)
    item = claim(data + TAKEN)
    while item < items:
        claim(counts + item * 8)
        put_integer(takers + item * 8, mine)
        item = claim(data + TAKEN)


@pytest.fixture(scope="module")
def kernel() -> int:
    return compiled(_mark)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("items", [0, 1, 6, 1000])
def test_every_item_is_taken_once(kernel: int, threads: int, items: int) -> None:
    counts, takers = torch.zeros(items + 1, dtype=torch.long), torch.zeros(items + 1, dtype=torch.long)
    run(kernel, threads, items, counts.data_ptr(), takers.data_ptr())
    assert counts.tolist() == [1] * items + [0]
    assert set(takers.tolist()) <= set(range(threads))


@pytest.mark.usefixtures("_threads")
def test_no_more_threads_come_than_there_are_items() -> None:
    torch.set_num_threads(4)
    assert threads_for(0) == 1
    assert {threads_for(items) <= min(items, 4) for items in range(1, 20)} == {True}
    torch.set_num_threads(1)
    assert {threads_for(items) for items in range(20)} == {1}


@pytest.mark.usefixtures("_threads")
def test_shares_are_no_smaller_than_is_worth_while() -> None:
    torch.set_num_threads(1)
    assert shares(3, 5) == 5
    assert shares(100, 5) == 25
