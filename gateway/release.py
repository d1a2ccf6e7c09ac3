"""Release: the gate between what was generated and what may be sent.

    generated → inspected (held while a guardrail needs to see more) → journaled, durably → outbox

**Promise 2** is kept here and in pipeline.py: a streamed piece enters the outbox only after the log confirmed it, and
an answer's last pieces only after its closing record. Delivered ≤ journaled ≤ inspected, always.

The first piece is journaled at once, later ones at a pace, and less often the more streams there are (`Pace`): many
streams share commits, and journaling does not take the time of an engine that shares its interpreter.
Text is inspected when it is to be journaled, all that waits in one go, or once `INSPECT_CHARS` of it wait: an inspector
decides the same however a text is cut, and a look costs more than the few characters of one step are worth.
It knows the log's `journal` and the policies' inspectors; it knows no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from audit.journal import TOKENS_BEHIND
from audit.records import Segment
from engine.request import TokenLogprob
from gateway.answer import Outbox, Piece
from gateway.trail import TokenText, Trail

INSPECT_CHARS = 1024  # generated and not yet inspected, at most, while nothing is journaled


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a stream's pieces are journaled. A piece costs about 0.1 ms of a core."""

    least_s: float  # between two pieces of a stream
    pieces_per_s: int  # of all streams together, about, beyond which each is paced slower
    few: int = 0  # streams that are not counted there: their pieces hold up nobody
    most_s: float = 0.200  # between two pieces, however many streams there are

    def rest_s(self, streams: int) -> float:
        """Return the seconds a stream rests between two pieces while so many are open."""
        return min(max(self.least_s, (streams - self.few) / self.pieces_per_s), self.most_s)


PACES = {  # by where the engine runs
    "thread": Pace(0.020, 200),  # every piece holds up a step
    # Answers were seen to come no slower, up to 32 streams, than with fewer pieces; more would wear the disk.
    "process": Pace(0.0005, 2_000, few=6),
}


Told = tuple[int, float, tuple[tuple[int, float], ...]]  # a token, its log-probability, and those of the likeliest


def told(one: TokenLogprob) -> Told:
    """Return what a log-probability tells, as it goes on record."""
    return one.token, one.logprob, one.top


def _data(piece: Piece) -> bytes:
    """Return all of a piece, as it is journaled."""
    text = piece.text.encode()
    return text + TOKENS_BEHIND + orjson.dumps([told(one) for one in piece.logprobs]) if piece.logprobs else text


class Inspector(Protocol):
    """One choice's output guardrails: text goes in, what may be released comes out."""

    @property
    def halted_by(self) -> str | None: ...

    def push(self, text: str) -> str: ...

    def finish(self, text: str = "") -> str: ...


class _Choice:
    """One choice's text between inspection and the outbox."""

    def __init__(self, inspector: Inspector, token_text: TokenText) -> None:
        self.inspector = inspector
        self.generated: list[str] = []  # not yet inspected
        self.uninspected = 0  # characters of it
        self.waiting: list[str] = []  # inspected, not yet journaled
        self.taken = 0  # characters that were waiting once
        self.trail = Trail(token_text)
        self.logprobs: list[TokenLogprob] = []  # all of them, to go on record
        self.output: list[str] = []  # everything inspected and fit to release, waiting or sent: what goes on record
        self.finish_reason: str | None = None

    def add(self, text: str) -> None:
        """Take newly generated text; after a halt it is no longer wanted."""
        if text and self.inspector.halted_by is None:
            self.generated.append(text)
            self.uninspected += len(text)

    def inspect(self) -> None:
        """Let the guardrails look at what was generated. The choice ends where one of them halts it."""
        if not self.generated:
            return
        self._pass(self.inspector.push(self._take_generated()))
        if self.inspector.halted_by is not None:
            self.finish_reason = "content_filter"

    def finish(self, reason: str) -> None:
        """No more text will come: what the guardrails still hold, or have not seen, is decided now."""
        if self.finish_reason is None:
            self._pass(self.inspector.finish(self._take_generated()))
            self.finish_reason = reason if self.inspector.halted_by is None else "content_filter"

    def _take_generated(self) -> str:
        text = "".join(self.generated)
        self.generated, self.uninspected = [], 0
        return text

    def _pass(self, text: str) -> None:
        if text:
            self.waiting.append(text)
            self.output.append(text)

    def take(self) -> str:
        text, self.waiting = "".join(self.waiting), []
        self.taken += len(text)
        return text


class Release:
    """The released-to-be text of one request, all its choices."""

    def __init__(
        self,
        tenant: str,
        request_id: str,
        inspectors: Sequence[Inspector],
        outbox: Outbox,
        journal: Callable[[Segment], Awaitable[None]],
        monotonic: Callable[[], float],
        token_text: TokenText,
        on_halt: Callable[[int], None],
        rest_s: Callable[[], float],
    ) -> None:
        """`on_halt` is told of a choice that a guardrail ended, once: nothing more of it is wanted. `rest_s` says how
        long the stream rests between two pieces now."""
        self._tenant = tenant
        self._request_id = request_id
        self._choices = [_Choice(inspector, token_text) for inspector in inspectors]
        self._outbox = outbox
        self._journal = journal
        self._monotonic = monotonic
        self._on_halt = on_halt
        self._rest_s = rest_s
        self.first_sent: float | None = None  # monotonic seconds
        self._rest_until = monotonic()
        self._sequence = 0
        self._unsent: list[Piece] = []  # being journaled
        self._ready = asyncio.Event()

    def add(self, choice: int, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """Take newly generated text of `choice`."""
        state = self._choices[choice]
        if logprobs:
            state.trail.add(logprobs)
            state.logprobs += logprobs
        state.add(text)
        if state.uninspected >= INSPECT_CHARS:
            self._inspect(choice)
        if state.generated or state.waiting:
            self._ready.set()

    def finish(self, choice: int, reason: str) -> None:
        """No more text will come for `choice`; unless a guardrail ended it, it ends for `reason`."""
        self._choices[choice].finish(reason)

    def _inspect(self, choice: int) -> None:
        state = self._choices[choice]
        going_on = state.finish_reason is None
        state.inspect()
        if going_on and state.finish_reason is not None:
            self._on_halt(choice)

    def finish_reason(self, choice: int) -> str | None:
        return self._choices[choice].finish_reason

    def output(self) -> list[str]:
        """The text of each choice that was or may be released."""
        return ["".join(state.output) for state in self._choices]

    def logprobs(self) -> list[list[Told]]:
        """What may be told of each choice's tokens."""
        return [[told(one) for one in state.logprobs] for state in self._choices]

    async def pump(self) -> None:
        """Journal and send what is ready, paced, until cancelled. Raises what the journal raises."""
        while True:
            await self._ready.wait()
            rest_s = self._rest_until - self._monotonic()
            if rest_s > 0:
                await asyncio.sleep(rest_s)
            self._ready.clear()
            if await self._journal_and_send():  # where all is held, the next step may free it
                self._rest_until = self._monotonic() + self._rest_s()

    def resting_s(self) -> float:
        """Return for how many seconds no more is wanted, unless it is the end."""
        rest_s = self._rest_until - self._monotonic()
        if rest_s <= 0 and (self._unsent or self._ready.is_set()):  # it is being journaled, or will be at once
            return self._rest_s() if self._sequence else 0.0
        return rest_s

    async def _journal_and_send(self) -> bool:
        """Return whether there was something to journal.

        Once every choice has its end the closing record is next, holds all that waits, and would wait for what is
        journaled before it: nothing more is. If this is cancelled in the middle, the pieces stay unsent, and
        `send_rest` sends them.
        """
        if all(state.finish_reason is not None for state in self._choices):
            return False
        confirmations: list[Awaitable[None]] = []
        for index, state in enumerate(self._choices):
            self._inspect(index)
            if not state.waiting:
                continue
            text = state.take()
            piece = Piece(index, text, state.trail.take(state.taken))
            self._unsent.append(piece)
            segment = Segment(self._tenant, self._request_id, index, self._sequence, _data(piece))
            confirmations.append(self._journal(segment))
            self._sequence += 1
        if len(confirmations) == 1:
            await confirmations[0]
        elif confirmations:
            await asyncio.gather(*confirmations)
        self._send_unsent()
        return bool(confirmations)

    def _send_unsent(self) -> None:
        if self._unsent and self.first_sent is None:
            self.first_sent = self._monotonic()
        for piece in self._unsent:
            self._outbox.put(piece)
        self._unsent = []

    def send_rest(self) -> None:
        """Send what is left. Only to be called once the closing record, which holds all of it, is durable."""
        self._send_unsent()
        for index, state in enumerate(self._choices):
            text = state.take()
            logprobs = state.trail.rest() if state.inspector.halted_by is None else ()  # what was withheld stays so
            self._outbox.put(Piece(index, text, logprobs, state.finish_reason))
