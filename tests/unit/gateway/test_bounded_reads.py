"""Bounded reads: as many at once as there are slots, as many waiting as there is room, and no more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gateway.bounded_reads import BoundedReads
from gateway.errors import ApiError


async def test_no_more_run_at_once_than_there_are_slots_and_the_rest_are_told_to_come_back() -> None:
    reads = BoundedReads(at_once=2, waiting=3)
    begun: list[int] = []
    two_run, go = threading.Barrier(3), threading.Event()

    def read(number: int) -> int:
        begun.append(number)
        if not go.is_set():
            two_run.wait(10)
        assert go.wait(10)
        return number

    admitted = [asyncio.ensure_future(reads.run(read, number)) for number in range(5)]
    await asyncio.to_thread(two_run.wait, 10)
    with pytest.raises(ApiError) as refused:
        await reads.run(read, 5)
    assert refused.value.code == "overloaded"
    assert len(begun) == 2
    go.set()
    assert await asyncio.gather(*admitted) == [0, 1, 2, 3, 4]
    assert await reads.run(read, 6) == 6


async def test_a_read_that_fails_gives_its_slot_back() -> None:
    reads = BoundedReads(at_once=1, waiting=0)

    def fail() -> None:
        raise KeyError("gone")

    for _ in range(3):
        with pytest.raises(KeyError):
            await reads.run(fail)


async def test_who_stops_waiting_does_not_let_another_read_in_beside_the_one_that_runs() -> None:
    reads = BoundedReads(at_once=1, waiting=1)
    running, most = 0, 0
    begun, go = threading.Event(), threading.Event()

    def read() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        begun.set()
        assert go.wait(10)
        running -= 1

    left = asyncio.ensure_future(reads.run(read))
    assert await asyncio.to_thread(begun.wait, 10)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    queued = asyncio.ensure_future(reads.run(read))
    await asyncio.sleep(0)
    with pytest.raises(ApiError):
        await reads.run(read)  # the thread still counts
    go.set()
    await queued
    assert most == 1
    never = asyncio.ensure_future(reads.run(read))
    never.cancel()  # before it had a slot
    with pytest.raises(asyncio.CancelledError):
        await never
    await reads.run(read)
