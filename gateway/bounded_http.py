"""The server's HTTP, with a bound on connections, and on what it keeps of a request that has not begun to make sense.

The parser collects a head, a chunk's extensions or a trailer until they end, however long they are, and before anybody
asks for a credential. Here a connection that sends `MAX_RATIO` times the headers we take, and still no end of them, is
answered 431 and closed; what is too large and ends is refused by admission.py, with its id.

What is small may still never come. A head must be there in time, from the connection's beginning or from its own first
byte on, or it is answered 408 and closed. So must a body, from its head on: the request is marked `LATE`, and who reads
it is told at once (admission.py answers 408, with its id). A request that comes whole in one piece costs no timer.

Who connects while `max_connections` are open is answered 503 and closed, before anything is read.

Knows bytes, no requests. Source: RFC 9112 sections 3, 7.1, 9.5; RFC 6585 section 5 (431); RFC 9110 section 15.5.9.
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import ApiError, headers_too_large, overloaded, request_timeout
from gateway.turn_transport import TurnTransport

MAX_RATIO = 4  # a header of one letter takes four bytes more than it counts
MAX_ADDRESS_BYTES = 65_536  # of the first line: what the parser takes
LATE = "probity.late"  # in the scope of a request whose body did not come in time


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    head_timeout_s = 10.0  # a server makes a kind of its own with its settings: see `bounded_http`
    body_timeout_s = 60.0
    max_connections = 2_048

    _unread = 0  # bytes since the last piece that was whole: a head, some of a body, a request
    _in_body = False  # a head came, its body did not yet
    _due: asyncio.TimerHandle | None = None  # when what is coming must be there

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as it is declared there
        super().connection_made(TurnTransport(transport, self.loop))
        if len(self.connections) > self.max_connections:
            self._refuse(overloaded())
        else:
            self._expect(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unexpect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_RATIO * self._max_header_bytes + MAX_ADDRESS_BYTES:
            self._refuse(headers_too_large(self._max_header_bytes))
        elif self._due is None and (self._in_body or self._unread):
            self._expect(self.body_timeout_s if self._in_body else self.head_timeout_s)

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._in_body = True
        self._unexpect()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        self._in_body = False
        self._unexpect()
        super().on_message_complete()

    @property
    def _max_header_bytes(self) -> int:
        size = self.config.h11_max_incomplete_event_size
        assert size is not None  # app.py sets it
        return size

    def _expect(self, within_s: float) -> None:
        if not self.transport.is_closing():
            self._due = self.loop.call_later(within_s, self._late)

    def _unexpect(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        self._due = None
        if self._in_body and not self.cycle.response_complete:
            cast(dict[str, object], self.cycle.scope)[LATE] = True
            self.cycle.message_event.set()
        elif self._in_body:
            self.transport.close()  # it was answered without its body
        elif self.cycle is not None and not self.cycle.response_complete:
            self._expect(self.head_timeout_s)  # the answer before it is not cut off
        else:
            self._refuse(request_timeout())

    def _refuse(self, refused: ApiError) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = refused.openai_body
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            lines = [f"{name}: {value}" for name, value in (headers | refused.headers).items()]
            self.transport.write("\r\n".join([f"HTTP/1.1 {refused.status} ", *lines, "", ""]).encode() + body)
        self.transport.close()


def bounded_http(head_timeout_s: float, body_timeout_s: float, max_connections: int) -> type[BoundedHttp]:
    """Return a kind of connection: heads and bodies must have come by then, and there may be so many of them."""
    bounds = {
        "head_timeout_s": head_timeout_s,
        "body_timeout_s": body_timeout_s,
        "max_connections": max_connections,
    }
    return type("BoundedHttp", (BoundedHttp,), bounds)
