"""An answer on its way to the caller: what may be sent, in order, and the outbox it waits in.

Everything in an outbox is on record already; who reads it, how fast, or not at all, changes nothing about the record.
The governed task (generation.py) writes, the HTTP side (streaming.py) reads; both live on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.request import TokenLogprob
from gateway.errors import ApiError

MAX_WAITING_PIECES = 64  # beyond it, pieces of one choice are joined: a slow reader costs no more than its answer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one choice that may be sent, with the reason it ends where it ends."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # stop | length | content_filter, on the last piece of a choice


@dataclass(frozen=True, slots=True)
class Usage:
    """The end of an answer, sent after its closing record is durable. Token counts."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    receipt: str  # of the closing record
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of the prompt's tokens but the first, where asked for


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer ends here, by name."""

    error: ApiError


Event = Piece | Usage | Failure


class Outbox:
    """A queue of events that never makes its writer wait.

    It is bounded by joining: past `MAX_WAITING_PIECES` the newest piece of the same choice grows instead, so what
    waits is at most the answer itself, whose length the policy and the context bound.
    """

    def __init__(self, on_abandon: Callable[[], None]) -> None:
        self._events: deque[Event] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._on_abandon = on_abandon
        self.abandoned = False  # the caller went away
        self.closed = False  # Usage or Failure was put

    def put(self, event: Event) -> None:
        if self.abandoned or self.closed:
            return
        if isinstance(event, Piece):
            self._put_piece(event)
        else:
            self._events.append(event)
            self.closed = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _put_piece(self, piece: Piece) -> None:
        if len(self._events) >= MAX_WAITING_PIECES:
            for position in range(len(self._events) - 1, -1, -1):
                waiting = self._events[position]
                if isinstance(waiting, Piece) and waiting.choice == piece.choice and waiting.finish_reason is None:
                    self._events[position] = replace(
                        waiting,
                        text=waiting.text + piece.text,
                        logprobs=waiting.logprobs + piece.logprobs,
                        finish_reason=piece.finish_reason,
                    )
                    return
        self._events.append(piece)

    async def peek(self) -> Event | None:
        """Return the next event without taking it, or None when there will be none: after the last, or abandoned."""
        while not self._events:
            if self.closed or self.abandoned:
                return None
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._events[0]

    async def take(self) -> list[Event]:
        """Wait for an event and return all that wait, in order; none when there will be none."""
        await self.peek()
        events = list(self._events)
        self._events.clear()
        return events

    @property
    def exhausted(self) -> bool:
        """All was taken, and nothing more will come."""
        return self.closed and not self._events

    def abandon(self) -> None:
        """The caller went away: forget what waits and tell the governed task, once."""
        if self.abandoned:
            return
        self.abandoned = True
        self._events.clear()
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
        if not self.closed:
            self._on_abandon()
