"""Stream: nothing lost, nothing out of order, and a loop that is left alone while its consumer rests."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from engine.request import EngineDead, FinishReason, TokenDelta, TokenLogprob
from engine.stream import Stream

LONG_S = 60.0  # no test waits for it


def delta(token: int, *, last: bool = False) -> TokenDelta:
    logprobs = (TokenLogprob(token, -1.0),)
    return TokenDelta(f"{token} ", (token,), logprobs, FinishReason.LENGTH if last else None)


async def test_what_comes_while_the_consumer_rests_is_given_as_one_when_it_has_rested() -> None:
    stream = Stream("r", asyncio.get_running_loop())
    resting = asyncio.create_task(stream.next(0.02))
    began = time.monotonic()
    await asyncio.sleep(0)
    assert stream.put(delta(0))
    stream.wake()
    for token in (1, 2):
        await asyncio.sleep(0)
        assert not stream.put(delta(token)), "the loop would be woken for nothing"
    given = await resting
    assert (given.text, given.tokens) == ("0 1 2 ", (0, 1, 2))
    assert [one.token for one in given.logprobs] == [0, 1, 2]
    assert given.finish_reason is None
    assert time.monotonic() - began >= 0.02


async def test_what_was_there_when_the_rest_began_is_given_with_what_comes_during_it() -> None:
    stream = Stream("r", asyncio.get_running_loop())
    stream.put(delta(0))
    resting = asyncio.create_task(stream.next(0.02))
    await asyncio.sleep(0)
    assert not stream.put(delta(1))
    assert not resting.done()
    assert (await resting).tokens == (0, 1)


async def test_what_comes_after_the_rest_is_given_at_once() -> None:
    stream = Stream("r", asyncio.get_running_loop())
    waiting = asyncio.create_task(stream.next(0.002))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert stream.put(delta(0))
    stream.wake()
    await asyncio.sleep(0)
    assert waiting.done()


async def test_who_waits_is_woken_by_the_first_delta_and_only_by_that() -> None:
    stream = Stream("r", asyncio.get_running_loop())
    waiting = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    assert stream.put(delta(0))
    assert not stream.put(delta(1))
    stream.wake()
    assert (await waiting).tokens == (0, 1)


@pytest.mark.parametrize("end", [delta(1, last=True), EngineDead("the engine failed")])
async def test_the_end_ends_a_rest_at_once(end: TokenDelta | EngineDead) -> None:
    stream = Stream("r", asyncio.get_running_loop())
    resting = asyncio.create_task(stream.next(LONG_S))
    await asyncio.sleep(0)
    stream.put(delta(0))
    assert stream.put(end)
    stream.wake()
    async with asyncio.timeout(20):
        given = await resting
    assert given.tokens == ((0, 1) if isinstance(end, TokenDelta) else (0,))
    if isinstance(end, TokenDelta):
        assert given.finish_reason is FinishReason.LENGTH
    else:
        with pytest.raises(EngineDead):
            await stream.next(LONG_S)


async def test_who_asks_after_the_end_has_come_does_not_rest() -> None:
    stream = Stream("r", asyncio.get_running_loop())
    stream.put(delta(0, last=True))
    async with asyncio.timeout(20):
        assert (await stream.next(LONG_S)).finish_reason is FinishReason.LENGTH


async def test_the_first_failure_is_the_one_that_is_told() -> None:
    stream = Stream("r", asyncio.get_running_loop())
    stream.put(EngineDead("first"))
    stream.put(EngineDead("second"))
    with pytest.raises(EngineDead, match="first"):
        await stream.next()


async def test_nothing_is_lost_or_out_of_order_whatever_the_threads_do() -> None:
    count = 20_000
    loop, rng = asyncio.get_running_loop(), random.Random(7)
    stream = Stream("r", loop)

    def tell() -> None:
        for token in range(count):
            if stream.put(delta(token, last=token == count - 1)):
                loop.call_soon_threadsafe(stream.wake)
            if token % 512 == 0:
                time.sleep(0.0005)

    thread = threading.Thread(target=tell)
    thread.start()
    tokens: list[int] = []
    async with asyncio.timeout(60):
        given = await stream.next()
        tokens += given.tokens
        while given.finish_reason is None:
            given = await stream.next(rng.choice([0.0, 0.0, 0.0001, 0.001]))
            tokens += given.tokens
    thread.join()
    assert tokens == list(range(count))


async def test_a_consumer_that_was_cancelled_while_it_rested_has_lost_nothing() -> None:
    stream = Stream("r", asyncio.get_running_loop())
    resting = asyncio.create_task(stream.next(0.01))
    await asyncio.sleep(0)
    stream.put(delta(0))
    stream.wake()
    resting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await resting
    assert (await stream.next()).tokens == (0,)
    waiting = asyncio.create_task(stream.next())
    await asyncio.sleep(0.03)  # the timer of the rest ends meanwhile
    assert not waiting.done()
    stream.put(delta(1))
    stream.wake()
    assert (await waiting).tokens == (1,)
