"""Stream: one request's deltas on their way from the step thread to its consumer.

Everything but `leaving` belongs to the consumer's event loop; the step thread comes in through `call_soon_threadsafe`.
A slow consumer holds back nobody: what it has not taken waits here, at most `max_tokens` + 1 deltas.
"""

from __future__ import annotations

import asyncio
from collections import deque

from engine.request import EngineError, TokenDelta


class Stream:
    __slots__ = ("_deltas", "_failure", "_wake", "leaving", "loop", "request_id", "watch")

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.leaving = False  # guarded by the runtime's lock: its abort was sent
        self.watch: asyncio.TimerHandle | None = None
        self._deltas: deque[TokenDelta] = deque()
        self._failure: EngineError | None = None
        self._wake = asyncio.Event()

    def put(self, item: TokenDelta | EngineError) -> None:
        if isinstance(item, TokenDelta):
            self._deltas.append(item)
        elif self._failure is None:
            self._failure = item
        self._wake.set()

    def unwatch(self) -> None:
        if self.watch is not None:
            self.watch.cancel()

    async def next(self) -> TokenDelta:
        """Return the next delta. What was generated before a failure is delivered before it.

        Raises: EngineError, the failure.
        """
        while not self._deltas:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        return self._deltas.popleft()
