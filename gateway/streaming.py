"""An answer on the wire: collected whole, or as server-sent events as it is released.

It reads an outbox and knows nothing of how an answer comes to be. A caller that goes away abandons the outbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.answer import Event, Failure, Outbox, Piece, Usage
from gateway.rendering.renderer import Renderer


async def chunks(outbox: Outbox, renderer: Renderer, choices: int) -> AsyncIterator[bytes]:
    """Yield server-sent events until the answer ends; what waits together in one go: each is a system call."""
    opening = renderer.opening(choices)
    while events := await outbox.take():
        yield opening + b"".join(_rendered(event, renderer) for event in events)
        opening = b""


def _rendered(event: Event, renderer: Renderer) -> bytes:
    if isinstance(event, Piece):
        return renderer.chunk(event)
    return renderer.closing(event) if isinstance(event, Usage) else renderer.failure(event.error)


async def collect(outbox: Outbox, choices: int) -> tuple[list[list[Piece]], Usage] | None:
    """Return the pieces of each choice and the usage, or None when the caller went away.

    Raises: ApiError, when the answer failed.
    """
    texts: list[list[Piece]] = [[] for _ in range(choices)]
    while events := await outbox.take():
        for event in events:
            if isinstance(event, Piece):
                texts[event.choice].append(event)
            elif isinstance(event, Failure):
                raise event.error
            else:
                return texts, event
    return None


class watch_disconnect:  # noqa: N801 - reads as a verb at its one place: `with watch_disconnect(...)`
    """While open, abandon `outbox` as soon as the client goes away."""

    def __init__(self, receive: Receive, outbox: Outbox) -> None:
        self._receive = receive
        self._outbox = outbox
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._outbox.abandon()


class EventStream(Response):
    """An ASGI response that sends an outbox as server-sent events.

    Starlette's own StreamingResponse is not used: it cancels the generator on disconnect, and it starts a task group
    per response. Here the only effect of a disconnect is `Outbox.abandon`.
    """

    def __init__(self, outbox: Outbox, renderer: Renderer, choices: int, headers: Mapping[str, str]) -> None:
        self._outbox = outbox
        self._chunks = chunks(outbox, renderer, choices)
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream"
        self.init_headers({"cache-control": "no-store", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with watch_disconnect(receive, self._outbox):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                more = True
                async for chunk in self._chunks:
                    more = not self._outbox.exhausted
                    await send({"type": "http.response.body", "body": chunk, "more_body": more})
                if more:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._outbox.abandon()
