"""Blocking reads beside the event loop: a few at once, some more may wait, the rest are told to come back.

Knows nothing of what is read. Officers' queries scan, and so do guardrails over a long prompt; they must not take the
threads or the connections that requests are answered with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from gateway import errors

P = ParamSpec("P")
T = TypeVar("T")

AT_ONCE = 4  # reads that run
WAITING = 64  # reads that wait; more are answered 503 `overloaded`


class BoundedReads:
    """One per process; lives on the event loop."""

    def __init__(self, at_once: int = AT_ONCE, waiting: int = WAITING) -> None:
        self._slots = asyncio.Semaphore(at_once)
        self._admitted = 0
        self._most = at_once + waiting

    async def run(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `read` returns, from another thread. Raises: ApiError when too many wait; what `read` raises."""
        if self._admitted >= self._most:
            raise errors.overloaded()
        self._admitted += 1
        try:
            await self._slots.acquire()
        except BaseException:
            self._admitted -= 1
            raise
        reading = asyncio.ensure_future(asyncio.to_thread(read, *args, **kwargs))
        reading.add_done_callback(self._ended)
        return await asyncio.shield(reading)  # who waits may leave; the thread runs on, and keeps its place

    def _ended(self, reading: asyncio.Future[Any]) -> None:
        self._slots.release()
        self._admitted -= 1
        if not reading.cancelled():
            reading.exception()  # heard, also where nobody waits any more
