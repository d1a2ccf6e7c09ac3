"""Release: delivered ≤ journaled ≤ inspected, at every moment, whatever fails and whenever it is cancelled."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress

import pytest

from audit.records import Segment
from audit.writer import LogUnavailable
from engine.request import TokenLogprob
from gateway.answer import Outbox, Piece
from gateway.release import INSPECT_CHARS, PACES, Pace, Release

REST_S = 0.02  # between two pieces


class Passing:
    """Lets everything pass, the last `hold` characters only when it is finished; halts at `halt_at` if it is seen."""

    def __init__(self, hold: int = 0, halt_at: str | None = None) -> None:
        self.halted_by: str | None = None
        self._hold = hold
        self._halt_at = halt_at
        self._held = ""

    def push(self, text: str) -> str:
        if self.halted_by is not None:
            return ""
        self._held += text
        if self._halt_at is not None and self._halt_at in self._held:
            passed = self._held[: self._held.index(self._halt_at)]
            self.halted_by, self._held = "guard", ""
            return passed
        upto = max(0, len(self._held) - self._hold)
        released, self._held = self._held[:upto], self._held[upto:]
        return released

    def finish(self, text: str = "") -> str:
        passed = self.push(text)
        released, self._held = passed + self._held, ""
        return released


class Journal:
    """Remembers what it confirmed. Confirms when told; a small real thing, without a database."""

    def __init__(self, *, at_once: bool = True) -> None:
        self.durable: list[Segment] = []
        self.submitted: list[Segment] = []
        self.failing = False
        self.go = asyncio.Event()
        if at_once:
            self.go.set()

    async def __call__(self, segment: Segment) -> None:
        self.submitted.append(segment)
        await self.go.wait()
        if self.failing:
            raise LogUnavailable("the database did not confirm")
        self.durable.append(segment)

    def text(self, choice: int) -> str:
        return b"".join(one.data for one in self.durable if one.choice == choice).decode()


class Bench:
    """A release on a journal, and what reached the outbox."""

    def __init__(self, *inspectors: Passing, journal: Journal | None = None) -> None:
        self.journal = journal or Journal()
        self.outbox = Outbox(on_abandon=lambda: None)
        self.halted: list[int] = []
        self.release = Release(
            "t",
            "r",
            inspectors or (Passing(),),
            self.outbox,
            self.journal,
            time.monotonic,
            _bytes_of,
            self.halted.append,
            lambda: REST_S,
        )
        self.pieces: list[Piece] = []

    def sent(self, choice: int = 0) -> str:
        """Take what waits in the outbox; return all the text of `choice` so far."""
        while self.outbox._events:
            event = self.outbox._events.popleft()
            assert isinstance(event, Piece)
            self.pieces.append(event)
        return "".join(piece.text for piece in self.pieces if piece.choice == choice)


def _bytes_of(token: int) -> bytes:
    return bytes([token])


def logprobs(text: str) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(byte, -1.0) for byte in text.encode())


async def turn(times: int = 20) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_nothing_enters_the_outbox_before_the_journal_confirms() -> None:
    bench = Bench(journal=Journal(at_once=False))
    pump = asyncio.create_task(bench.release.pump())
    bench.release.add(0, "hello")
    await turn()
    assert [segment.data for segment in bench.journal.submitted] == [b"hello"]
    assert bench.sent() == ""
    bench.journal.go.set()
    await turn()
    assert bench.sent() == "hello"
    await cancelled(pump)


async def test_the_first_piece_goes_at_once_and_later_ones_share_a_segment() -> None:
    bench = Bench()
    pump = asyncio.create_task(bench.release.pump())
    bench.release.add(0, "a")
    await turn()
    assert bench.sent() == "a"
    for text in "bcd":
        bench.release.add(0, text)
        await turn()
    assert bench.sent() == "a"  # paced
    await asyncio.sleep(REST_S * 2)
    assert bench.sent() == "abcd"
    assert [segment.data for segment in bench.journal.durable] == [b"a", b"bcd"]
    assert [segment.sequence for segment in bench.journal.durable] == [0, 1]
    await cancelled(pump)


@pytest.mark.parametrize(("streams", "seconds"), [(1, 0.02), (4, 0.02), (8, 0.04), (32, 0.16), (1000, 0.2)])
def test_the_more_streams_there_are_the_slower_each_is_paced(streams: int, seconds: float) -> None:
    assert Pace(0.02, 200).rest_s(streams) == pytest.approx(seconds)
    assert Pace(0.02, 200, few=6).rest_s(streams + 6) == pytest.approx(seconds)


def test_a_few_streams_are_paced_no_slower_than_one() -> None:
    for streams in range(1, 7):
        assert Pace(0.0005, 2_000, few=6).rest_s(streams) == 0.0005


def test_an_engine_that_shares_the_interpreter_is_spared_pieces() -> None:
    for streams in (1, 8, 32, 1000):
        assert PACES["thread"].rest_s(streams) >= PACES["process"].rest_s(streams)


async def test_a_first_piece_that_is_held_leaves_as_soon_as_it_may() -> None:
    bench = Bench(Passing(hold=4))
    pump = asyncio.create_task(bench.release.pump())
    for text, expected in (("ab", ""), ("cd", ""), ("ef", "ab"), ("gh", "ab")):
        bench.release.add(0, text)
        await turn()
        assert bench.sent() == expected  # the last one is paced
    await cancelled(pump)


async def test_what_the_journal_refuses_never_leaves_and_the_pump_says_so() -> None:
    bench = Bench()
    bench.journal.failing = True
    bench.release.add(0, "secret")
    with pytest.raises(LogUnavailable):
        await bench.release.pump()
    assert bench.sent() == ""
    assert bench.release.output() == ["secret"]  # it was fit to be released: it goes on record


async def test_a_pump_cancelled_while_it_waits_loses_nothing_and_sends_nothing_twice() -> None:
    bench = Bench(Passing(), Passing(), journal=Journal(at_once=False))
    pump = asyncio.create_task(bench.release.pump())
    bench.release.add(0, "left", logprobs("left"))
    bench.release.add(1, "right")
    await turn()
    await cancelled(pump)
    assert (bench.sent(0), bench.sent(1)) == ("", "")
    bench.release.add(0, " more", logprobs(" more"))
    bench.release.finish(0, "stop")
    bench.release.finish(1, "length")
    assert bench.release.output() == ["left more", "right"]
    bench.release.send_rest()  # the closing record is durable
    assert (bench.sent(0), bench.sent(1)) == ("left more", "right")
    shown = [entry.token for piece in bench.pieces if piece.choice == 0 for entry in piece.logprobs]
    assert bytes(shown) == b"left more"
    assert {piece.choice: piece.finish_reason for piece in bench.pieces if piece.finish_reason} == {
        0: "stop",
        1: "length",
    }


@pytest.mark.parametrize("seed", range(20))
async def test_sent_is_a_prefix_of_journaled_and_that_of_inspected_at_every_moment(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(Passing(hold=3), Passing(), Passing(hold=40))
    pump = asyncio.create_task(bench.release.pump())
    said = ["", "", ""]
    for _ in range(200):
        choice = rng.randrange(3)
        text = "".join(rng.choice("ab €\n") for _ in range(rng.randrange(5)))
        said[choice] += text
        bench.release.add(choice, text)
        if rng.random() < 0.05:
            await asyncio.sleep(REST_S / 4)
        await turn(rng.randrange(4))
        for index in range(3):
            assert bench.journal.text(index).startswith(bench.sent(index))
            assert bench.release.output()[index].startswith(bench.journal.text(index))
            assert said[index].startswith(bench.release.output()[index])
    await cancelled(pump)
    for index in range(3):
        bench.release.finish(index, "stop")
    bench.release.send_rest()
    assert [bench.sent(index) for index in range(3)] == said == bench.release.output()
    sequences = [segment.sequence for segment in bench.journal.submitted]
    assert sequences == list(range(len(sequences)))


async def test_a_halted_choice_ends_with_what_had_passed_and_the_others_go_on() -> None:
    bench = Bench(Passing(hold=2, halt_at="4111"), Passing())
    bench.release.add(0, "your card: 4")
    bench.release.add(0, "111", logprobs("111"))
    bench.release.add(1, "fine")
    bench.release.finish(0, "stop")
    bench.release.finish(1, "stop")
    assert (bench.release.finish_reason(0), bench.release.finish_reason(1)) == ("content_filter", "stop")
    bench.release.send_rest()
    assert (bench.sent(0), bench.sent(1)) == ("your card: ", "fine")
    assert [piece.logprobs for piece in bench.pieces if piece.choice == 0] == [()]  # they would show what was withheld


async def test_a_streamed_choice_is_halted_when_its_text_is_to_be_journaled_and_nothing_more_is_taken() -> None:
    bench = Bench(Passing(hold=2, halt_at="4111"), Passing())
    pump = asyncio.create_task(bench.release.pump())
    bench.release.add(0, "your card: 4")
    await turn()
    assert (bench.sent(0), bench.halted) == ("your card:", [])
    bench.release.add(0, "111")
    bench.release.add(1, "fine")
    await asyncio.sleep(REST_S * 2)
    assert bench.halted == [0]
    bench.release.add(0, " and more")
    await asyncio.sleep(REST_S * 2)
    await cancelled(pump)
    bench.release.finish(0, "stop")
    bench.release.finish(1, "stop")
    bench.release.send_rest()
    assert (bench.sent(0), bench.sent(1), bench.halted) == ("your card: ", "fine", [0])
    assert bench.release.finish_reason(0) == "content_filter"


async def test_an_answer_that_nobody_pumps_is_halted_before_it_has_grown_long() -> None:
    bench = Bench(Passing(halt_at="4111"))
    bench.release.add(0, "4111")
    assert bench.halted == []
    bench.release.add(0, "x" * (INSPECT_CHARS - 5))
    assert bench.halted == []
    bench.release.add(0, "x")
    assert bench.halted == [0]
    bench.release.finish(0, "stop")
    assert bench.release.output() == [""]


async def test_once_every_choice_has_its_end_nothing_more_is_journaled() -> None:
    bench = Bench(Passing(), Passing())
    pump = asyncio.create_task(bench.release.pump())
    bench.release.add(0, "left")
    bench.release.finish(0, "stop")
    await turn()
    assert (bench.sent(0), bench.journal.text(0)) == ("left", "left")  # the other one may go on for long
    bench.release.add(1, "right")
    bench.release.finish(1, "stop")
    await asyncio.sleep(REST_S * 2)
    assert (bench.sent(1), bench.journal.text(1)) == ("", "")
    await cancelled(pump)
    bench.release.send_rest()
    assert (bench.sent(0), bench.sent(1)) == ("left", "right")


async def test_log_probabilities_wait_for_held_text() -> None:
    bench = Bench(Passing(hold=4))
    pump = asyncio.create_task(bench.release.pump())
    bench.release.add(0, "abcdef", logprobs("abcdef"))
    await turn()
    assert bench.sent() == "ab"
    assert [entry.token for entry in bench.pieces[0].logprobs] == list(b"ab")
    await cancelled(pump)
    bench.release.finish(0, "stop")
    bench.release.send_rest()
    assert bench.sent() == "abcdef"
    assert [entry.token for piece in bench.pieces for entry in piece.logprobs] == list(b"abcdef")


async def test_an_answer_without_a_word_still_has_its_end() -> None:
    bench = Bench()
    bench.release.finish(0, "stop")
    bench.release.send_rest()
    assert bench.sent() == ""
    assert [piece.finish_reason for piece in bench.pieces] == ["stop"]
    assert bench.journal.submitted == []


async def test_nothing_is_unwanted_before_the_first_piece_nor_while_all_is_held() -> None:
    bench = Bench(Passing(hold=8))
    pump = asyncio.create_task(bench.release.pump())
    assert bench.release.resting_s() <= 0
    bench.release.add(0, "held")
    assert bench.release.resting_s() <= 0
    await turn()
    assert bench.journal.submitted == []
    assert bench.release.resting_s() <= 0
    await cancelled(pump)


async def test_no_more_is_wanted_while_a_piece_is_journaled_and_for_as_long_as_the_pace_says_after_it() -> None:
    bench = Bench(journal=Journal(at_once=False))
    pump = asyncio.create_task(bench.release.pump())
    bench.release.add(0, "first")
    await turn()
    assert bench.release.resting_s() == REST_S
    bench.journal.go.set()
    await turn()
    assert bench.sent() == "first"
    assert 0 < bench.release.resting_s() <= REST_S
    bench.release.add(0, "second")
    assert 0 < bench.release.resting_s() <= REST_S
    await asyncio.sleep(REST_S * 2)
    assert bench.sent() == "firstsecond"
    await cancelled(pump)
