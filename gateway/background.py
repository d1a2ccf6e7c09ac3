"""A gateway served from a thread of this process, for commands that need one for a while: the demo and the officers'.

It is the server that `probity serve` runs; only its signals are not handled here, and leaving the block ends it.
"""

from __future__ import annotations

import threading
from types import TracebackType

import httpx
from fastapi import FastAPI

from gateway.app import server
from gateway.start_refusal import NotServing

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class BackgroundServer:
    """`with BackgroundServer(app) as url:` serves from entering to leaving."""

    def __init__(self, app: FastAPI) -> None:
        self._server = server(app)
        self._thread = threading.Thread(target=self._server.run, name="probity-server", daemon=True)

    def __enter__(self) -> str:
        """Return the URL once the gateway is ready. Raises: NotServing."""
        self._thread.start()
        pause = threading.Event()  # never set: a pause that needs no clock
        for _ in range(round(START_TIMEOUT_S / 0.02)):
            if self._server.started and _ready(self.url):
                return self.url
            if not self._thread.is_alive():
                raise NotServing("the server ended at its start; is the port in use?")
            pause.wait(0.02)
        self._end()
        raise NotServing(f"the gateway was not ready within {START_TIMEOUT_S:.0f} s; `/readyz` says what is missing")

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end()

    @property
    def url(self) -> str:
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}" if ":" not in host else f"http://[{host}]:{port}"

    def wait(self) -> None:
        """Return when the server has ended."""
        self._thread.join()

    def _end(self) -> None:
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
