"""Stream: one request's deltas on their way from the worker to its consumer.

`put` is called from a thread of the worker, everything else in the consumer's event loop. The loop is woken only for
who waits: while a consumer rests (`next`), or is busy, what comes gathers, and is given to it as one. A timer is set
only for what comes during a rest: where steps take longer, there is none. A slow consumer holds back nobody: what it
has not taken waits here, at most `max_tokens` + 1 deltas.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

from engine.request import EngineError, TokenDelta


class Stream:
    __slots__ = (
        "_asleep",
        "_deltas",
        "_ended",
        "_failure",
        "_lock",
        "_rest_until",
        "_timer",
        "_waiter",
        "leaving",
        "loop",
        "request_id",
        "watch",
    )

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.leaving = False  # guarded by the runtime's lock: its abort was sent
        self.watch: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # of a rest in which something came
        self._rest_until = 0.0  # monotonic: a loop's own time may count milliseconds
        self._lock = threading.Lock()  # of the rest
        self._deltas: list[TokenDelta] = []
        self._failure: EngineError | None = None
        self._ended = False  # nothing more will come
        self._asleep = False  # nothing waits here, and the consumer does

    def put(self, item: TokenDelta | EngineError) -> bool:
        """Take what came, from any thread. Return whether `wake` is to be called, in the loop."""
        with self._lock:
            if isinstance(item, TokenDelta):
                self._deltas.append(item)
                self._ended = self._ended or item.finish_reason is not None
            else:
                self._failure = self._failure or item
                self._ended = True
            waited_for = self._asleep or self._ended
            self._asleep = False
            return waited_for

    def wake(self) -> None:
        """Let the consumer have what came, now or when it has rested."""
        left_s = 0.0 if self._ended else self._rest_until - time.monotonic()
        if left_s <= 0:
            self._rested()
        elif self._timer is None:
            self._timer = self.loop.call_later(left_s, self._rested)

    def _rested(self) -> None:
        self._rest_until = 0.0  # a timer may be early
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def unwatch(self) -> None:
        if self.watch is not None:
            self.watch.cancel()

    async def next(self, rest_s: float = 0) -> TokenDelta:
        """Return what has come, as one delta; wait for it, and before that rest so long, unless the end comes.

        Raises: EngineError, the failure; what was generated before it is returned first.
        """
        if rest_s > 0:
            self._rest_until = time.monotonic() + rest_s
        while not (deltas := self._taken()):
            # Made before the loop can run what `put` asked of it since.
            self._waiter = self.loop.create_future()
            if self._deltas:
                self.wake()
            await self._waiter
        return _joined(deltas)

    def _taken(self) -> Sequence[TokenDelta]:
        """Return what waits, none while the consumer rests."""
        with self._lock:
            if self._deltas and not self._ended and self._rest_until > time.monotonic():
                return ()
            deltas, self._deltas = self._deltas, []
            if not deltas and self._failure is not None:
                raise self._failure
            self._asleep = not deltas
            return deltas


def _joined(deltas: Sequence[TokenDelta]) -> TokenDelta:
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    return TokenDelta(
        text="".join([delta.text for delta in deltas]),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        logprobs=tuple(one for delta in deltas for one in delta.logprobs),
        finish_reason=last.finish_reason,
        stats=last.stats,
        prompt_logprobs=first.prompt_logprobs,
        embedding=last.embedding,
    )
