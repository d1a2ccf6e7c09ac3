"""The outbox: it never makes its writer wait, loses nothing, keeps the order, and is bounded by the answer."""

from __future__ import annotations

import asyncio
import random

from engine.request import TokenLogprob
from gateway import errors
from gateway.answer import MAX_WAITING_PIECES, Failure, Outbox, Piece, Usage

USAGE = Usage(3, 0, 5, "receipt")


class Abandonments:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def make() -> tuple[Outbox, Abandonments]:
    told = Abandonments()
    return Outbox(on_abandon=told), told


async def drain(outbox: Outbox) -> list[Piece | Usage | Failure]:
    events: list[Piece | Usage | Failure] = []
    while some := await outbox.take():
        events += some
    return events


async def test_events_come_out_in_the_order_they_went_in_and_then_none() -> None:
    outbox, _ = make()
    events = [Piece(0, "a"), Piece(1, "b"), Piece(0, "c", finish_reason="stop"), USAGE]
    for event in events:
        outbox.put(event)
    assert not outbox.exhausted
    assert await outbox.take() == events
    assert outbox.exhausted
    assert await outbox.take() == []


async def test_a_reader_that_waits_is_woken() -> None:
    outbox, _ = make()
    reading = asyncio.create_task(drain(outbox))
    await asyncio.sleep(0)
    for event in (Piece(0, "a"), USAGE):
        outbox.put(event)
        await asyncio.sleep(0)
    assert await reading == [Piece(0, "a"), USAGE]


async def test_nothing_is_taken_after_the_end() -> None:
    outbox, _ = make()
    failure = Failure(errors.suspended())
    for event in (failure, Piece(0, "late"), USAGE, Failure(errors.overloaded())):
        outbox.put(event)
    assert await drain(outbox) == [failure]


async def test_a_slow_reader_gets_all_of_it_in_a_bounded_number_of_pieces() -> None:
    rng = random.Random(3)
    outbox, _ = make()
    said = {0: "", 1: "", 2: ""}
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number in range(5_000):
        choice = rng.randrange(3)
        text = rng.choice(["", "é", "word "])
        said[choice] += text
        tokens[choice].append(number)
        outbox.put(Piece(choice, text, (TokenLogprob(number, -1.0),)))
    for choice in said:
        outbox.put(Piece(choice, "", finish_reason="stop"))
    outbox.put(USAGE)
    events = await drain(outbox)
    assert len(events) <= MAX_WAITING_PIECES + len(said) + 1
    assert events[-1] == USAGE
    pieces = [event for event in events if isinstance(event, Piece)]
    for choice in said:
        own = [piece for piece in pieces if piece.choice == choice]
        assert "".join(piece.text for piece in own) == said[choice]
        assert [entry.token for piece in own for entry in piece.logprobs] == tokens[choice]
        assert [piece.finish_reason for piece in own if piece.finish_reason] == ["stop"]
        assert own[-1].finish_reason == "stop"


async def test_a_peeked_event_is_still_there() -> None:
    outbox, _ = make()
    outbox.put(Piece(0, "a"))
    outbox.put(USAGE)
    assert await outbox.peek() == Piece(0, "a")
    assert await outbox.peek() == Piece(0, "a")
    assert await drain(outbox) == [Piece(0, "a"), USAGE]


async def test_leaving_is_told_once_wakes_the_reader_and_forgets_what_waits() -> None:
    outbox, told = make()
    reading = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.abandon()
    outbox.abandon()
    assert await reading == []
    outbox.put(Piece(0, "late"))
    assert await outbox.take() == []
    assert told.count == 1


async def test_leaving_after_the_end_tells_nobody() -> None:
    outbox, told = make()
    outbox.put(USAGE)
    outbox.abandon()
    assert told.count == 0
    assert outbox.abandoned
