"""A real gateway in a process of its own, on loopback: started, waited for, killed without mercy, started again."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

START_TIMEOUT_S = 60
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """`python -m tests.support.serve_scripted …` under our thumb. What it says on stderr gathers in a file."""

    def __init__(self, data: Path, *, database_url: str | None = None, options: Sequence[str] = ()) -> None:
        self.data = data
        self.port = free_port()
        self.stderr = data.parent / f"{data.name}.stderr"
        self._options = ["--data", str(data), "--port", str(self.port), *options]
        if database_url is not None:
            self._options += ["--database-url", database_url]
        self._database_url = database_url
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database_url(self) -> str:
        return self._database_url or f"sqlite:///{self.data / 'probity.sqlite3'}"

    def start(self) -> None:
        command = [sys.executable, "-W", "error", "-m", "tests.support.serve_scripted", *self._options]
        with self.stderr.open("ab") as stderr:
            self._process = subprocess.Popen(command, stderr=stderr, stdout=stderr, cwd=ROOT)
        deadline = time.monotonic() + START_TIMEOUT_S
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise AssertionError(f"the server ended at start: {self.stderr.read_text()[-4000:]}")
                try:
                    if client.get("/readyz").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.02)
        raise AssertionError("the server did not become ready")

    def kill(self) -> None:
        """kill -9: no handler runs, nothing is flushed."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to end, and return its exit status."""
        return self._end(signal.SIGTERM)

    def limit_files(self, size: int) -> None:
        """Let none of its files grow beyond `size` bytes: a write behind that fails, and SQLite says I/O error."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, size))

    def wait(self) -> int:
        """Return its exit status once it has ended by itself."""
        assert self._process is not None
        return self._process.wait(timeout=60)

    def verify(self) -> None:
        """Recompute the log as an auditor would: in a process that knows only `audit`."""
        arguments = [self.database_url, "--trust", str(self.data / "trust"), "--checkpoint", str(self.data / "ratchet")]
        command = [sys.executable, "-m", "audit.verify", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert result.returncode == 0, result.stdout + result.stderr

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        os.kill(self._process.pid, how)
        return self._process.wait(timeout=60)
