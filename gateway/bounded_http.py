"""The server's HTTP, with a bound on what it keeps of a request that has not begun to make sense.

The parser collects a head, a chunk's extensions or a trailer until they end, however long they are, and before anybody
asks for a credential. Here a connection that sends `MAX_RATIO` times the headers we take, and still no end of them, is
answered 431 and closed; what is too large and ends is refused by admission.py, with its id.

Knows bytes, no requests. Source: RFC 9112 sections 3, 7.1; RFC 6585 section 5 (431).
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import headers_too_large

MAX_RATIO = 4  # a header of one letter takes four bytes more than it counts
MAX_ADDRESS_BYTES = 65_536  # of the first line: what the parser takes


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _unread = 0  # bytes since the last piece that was whole: a head, some of a body, a request

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_RATIO * self._max_header_bytes + MAX_ADDRESS_BYTES:
            self._refuse()

    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    @property
    def _max_header_bytes(self) -> int:
        size = self.config.h11_max_incomplete_event_size
        assert size is not None  # app.py sets it
        return size

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = headers_too_large(self._max_header_bytes).openai_body
            head = f"HTTP/1.1 431 \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
