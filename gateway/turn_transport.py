"""A connection's transport that sends in one call of the system what one turn of the event loop writes.

An answer's head and its first piece, or its last piece and its end, are written one after the other; sent one by one,
each would cost a call, in which another thread takes the interpreter, and wake the client, which then waits for the
rest. Order, back-pressure and closing are the transport's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


class TurnTransport(asyncio.Transport):
    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._written: list[Any] = []  # in this turn

    def write(self, data: Any) -> None:
        if not self._written:
            self._loop.call_soon(self._send)
        self._written.append(data)

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        for data in list_of_data:
            self.write(data)

    def _send(self) -> None:
        written, self._written = self._written, []
        if written:
            self._transport.writelines(written)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def abort(self) -> None:
        self._written = []
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._transport.get_protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)
