"""Connections are bounded in number: one more is told so and closed, and those that are open go on."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.app import create_app
from gateway.open_files import BESIDE_CONNECTIONS, TooFewFiles
from gateway.settings import load_settings
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.scripted_engine import ScriptedEngine

MOST = 12
MOST_CONNECTIONS = 1_048_576  # that the setting allows
PATIENCE_S = 20
ASKED = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path, ScriptedEngine(), server__max_connections=MOST) as running:
        yield running


def connected(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=PATIENCE_S)


def answered(connection: socket.socket) -> bytes:
    connection.sendall(ASKED)
    return connection.recv(65_536)


def to_the_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_one_connection_too_many_is_told_and_closed_and_the_others_go_on(gateway: RunningGateway) -> None:
    with ExitStack() as opened:
        open_ones = [opened.enter_context(connected(gateway)) for _ in range(MOST)]
        for connection in open_ones:
            assert answered(connection).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            with connected(gateway) as refused:
                said = to_the_end(refused)
            assert said.startswith(b"HTTP/1.1 503")
            assert b'"overloaded"' in said
            assert b"retry-after" in said
        for connection in open_ones:
            assert answered(connection).startswith(b"HTTP/1.1 200")
        open_ones[0].shutdown(socket.SHUT_RDWR)
        assert to_the_end(open_ones[0]) == b""
        said = b""
        while not said.startswith(b"HTTP/1.1 200"):  # the end of the other may take a moment to be known
            with connected(gateway) as new:
                said = answered(new)


def test_more_connections_than_files_are_a_refusal_to_start_before_anything_is_opened(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > MOST_CONNECTIONS:
        pytest.skip("this machine lets a process open any number of files")
    data = tmp_path / "data"
    settings = load_settings(None, {}, {"data_dir": str(data), "server.max_connections": hard})
    with pytest.raises(TooFewFiles, match="max_connections"):
        create_app(settings)
    assert not data.exists()


def test_a_low_limit_is_raised_as_far_as_it_may_be() -> None:
    code = (
        "import resource; from gateway.open_files import make_room; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])); "
        "make_room(500); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert int(said) == 500 + BESIDE_CONNECTIONS
