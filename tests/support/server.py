"""A real gateway in a process of its own, on loopback: started, waited for, killed without mercy, started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

START_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """`python -m tests.support.serve_scripted …` under our thumb."""

    def __init__(self, data: Path, *, database_url: str | None = None, options: Sequence[str] = ()) -> None:
        self.data = data
        self.port = free_port()
        self._options = ["--data", str(data), "--port", str(self.port), *options]
        if database_url is not None:
            self._options += ["--database-url", database_url]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-W", "error", "-m", "tests.support.serve_scripted", *self._options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"the server ended at start: {self._process.stderr.read().decode()[-4000:]}")
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError("the server did not become ready")

    def kill(self) -> None:
        """kill -9: no handler runs, nothing is flushed."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to end, and return its exit status."""
        return self._end(signal.SIGTERM)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        os.kill(self._process.pid, how)
        status = self._process.wait(timeout=30)
        assert self._process.stderr is not None
        self._process.stderr.close()
        return status
