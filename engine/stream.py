"""Stream: one request's deltas on their way from the worker to its consumer.

`put` is called from a thread of the worker, everything else in the consumer's event loop. The loop is woken only for
who waits: while a consumer rests (`next`), or is busy, what comes gathers, and is given to it as one. A slow consumer
holds back nobody: what it has not taken waits here, at most `max_tokens` + 1 deltas.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from engine.request import EngineError, TokenDelta


class Stream:
    __slots__ = (
        "_asleep",
        "_deltas",
        "_ended",
        "_failure",
        "_lock",
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
        self._lock = threading.Lock()  # of the rest
        self._deltas: list[TokenDelta] = []
        self._failure: EngineError | None = None
        self._ended = False  # nothing more will come
        self._asleep = False  # the consumer waits for whatever comes

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
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def unwatch(self) -> None:
        if self.watch is not None:
            self.watch.cancel()

    async def next(self, rest_s: float = 0) -> TokenDelta:
        """Return what has come, as one delta; wait for it, and before that rest so long, unless the end comes.

        Raises: EngineError, the failure; what was generated before it is returned first.
        """
        if rest_s > 0 and not self._ended:
            timer = self.loop.call_later(rest_s, self.wake)
            try:
                await self._woken()
            finally:
                timer.cancel()
        while not (deltas := self._taken()):
            await self._woken()
        return _joined(deltas)

    def _taken(self) -> Sequence[TokenDelta]:
        with self._lock:
            deltas, self._deltas = self._deltas, []
            if not deltas and self._failure is not None:
                raise self._failure
            self._asleep = not deltas
            return deltas

    async def _woken(self) -> None:
        # Made before the loop can run what `put` asked of it since.
        self._waiter = self.loop.create_future()
        await self._waiter


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
