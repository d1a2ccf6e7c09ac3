"""A proxy before PostgreSQL's Unix socket that loses answers: the network's part in fault tests.

Armed with `cut_at_commit`, it breaks the next connection that says COMMIT, either before the server hears it or after
the server has done it; in both cases the client is not answered.
"""

from __future__ import annotations

import itertools
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

NAME = ".s.PGSQL.5432"


class SocketProxy:
    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream / NAME
        self.directory = Path(tempfile.mkdtemp(prefix="probity-proxy-"))
        self._armed: str | None = None
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._silenced: socket.socket | None = None  # its commit is done, and it shall not know
        self.cuts = 0
        self._listener: socket.socket | None = None
        self.up()

    def cut_at_commit(self, when: str) -> None:
        """`when`: `before` the server hears of it | `after` it is done."""
        self._armed = when

    def up(self) -> None:
        """Accept connections."""
        (self.directory / NAME).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.directory / NAME))
        listener.listen()
        self._listener = listener
        self._spawn(self._accept, listener)

    def down(self) -> None:
        """Refuse connections and cut those that stand."""
        (self.directory / NAME).unlink(missing_ok=True)
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for pair in self._pairs:
            _cut(*pair)

    def close(self) -> None:
        self.down()
        for thread in self._threads:
            thread.join()
        for connection in itertools.chain.from_iterable(self._pairs):
            connection.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._upstream))
            self._pairs.append((client, server))
            self._spawn(self._to_server, client, server)
            self._spawn(self._to_client, client, server)

    def _spawn(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _to_server(self, client: socket.socket, server: socket.socket) -> None:
        silenced = False
        while data := _receive(client):
            if b"COMMIT" in data and self._armed is not None:
                when, self._armed = self._armed, None
                self.cuts += 1
                if when == "before":
                    break
                silenced = True
                self._silenced = client  # cut at the server's next word
            try:
                server.sendall(data)
            except OSError:
                break
        if not silenced:
            _cut(client, server)

    def _to_client(self, client: socket.socket, server: socket.socket) -> None:
        while data := _receive(server):
            if self._silenced is client:  # the server did it, and says so
                break
            try:
                client.sendall(data)
            except OSError:
                break
        _cut(client, server)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


def _cut(*connections: socket.socket) -> None:
    for connection in connections:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
