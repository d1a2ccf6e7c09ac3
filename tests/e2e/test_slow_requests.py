"""What comes slowly holds nothing for long: heads and bodies have a time, and all bodies together a size."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from gateway.bodies import Bodies
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand, leaves
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
PATIENCE_S = 20
ONCE_TIMED_OUT_S = 0.4


hesitate = threading.Event()  # the next answer, once


async def step(position: int) -> None:
    if hesitate.is_set():
        hesitate.clear()
        await asyncio.sleep(3 * ONCE_TIMED_OUT_S)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    overrides: dict[str, Any] = {
        "server__head_timeout_s": ONCE_TIMED_OUT_S,
        "server__body_timeout_s": ONCE_TIMED_OUT_S,
        "server__max_bodies_mib": 4,
    }
    with running_gateway(tmp_path_factory.mktemp("slow"), ScriptedEngine(step=step), **overrides) as running:
        yield running


def connected(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=PATIENCE_S)


def head_of(gateway: RunningGateway, length: int, path: str = "/v1/chat/completions") -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "host: x",
        f"authorization: Bearer {gateway.credential()}",
        "content-type: application/json",
        f"content-length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def until_closed(connection: socket.socket, drip: bytes = b"") -> bytes:
    """Send a byte now and then; return what was answered once the other side has ended the connection."""
    answered = b""
    connection.settimeout(0.05)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(ConnectionError):
            if drip:
                connection.sendall(drip)
        try:
            piece = connection.recv(65_536)
        except TimeoutError:
            continue
        except ConnectionError:
            return answered
        if not piece:
            return answered
        answered += piece
    raise AssertionError("the connection is still held")


@pytest.mark.parametrize("begun", [b"", b"GET /livez HTTP/1.1\r\nx: "])
def test_a_head_that_does_not_come_in_time_is_answered_408_and_closed(gateway: RunningGateway, begun: bytes) -> None:
    with closing(connected(gateway)) as connection:
        connection.sendall(begun)
        answered = until_closed(connection, drip=b"a" if begun else b"")
    assert answered.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answered


def test_the_head_of_a_later_request_has_its_time_too(gateway: RunningGateway) -> None:
    with closing(connected(gateway)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        while b'"ok"' not in connection.recv(65_536):
            pass
        connection.sendall(b"GET /li")
        assert until_closed(connection, drip=b"v").startswith(b"HTTP/1.1 408 ")


def test_a_body_that_does_not_come_in_time_is_answered_408_on_record(gateway: RunningGateway) -> None:
    before = len(leaves(gateway))
    with closing(connected(gateway)) as connection:
        connection.sendall(head_of(gateway, 100_000) + b'{"model": "')
        answered = until_closed(connection, drip=b"a")
    assert answered.startswith(b"HTTP/1.1 408 ")
    head, _, body = answered.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert b"probity-receipt: " in head
    (denied,) = leaves(gateway)[before:]
    assert (denied.type.value, denied.body["code"]) == ("request.denied", "request_timeout")


def test_a_body_that_nobody_waits_for_does_not_hold_its_connection(gateway: RunningGateway) -> None:
    with closing(connected(gateway)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        assert until_closed(connection, drip=b"a").startswith(b"HTTP/1.1 401 ")


def test_an_answer_that_takes_longer_than_a_head_may_is_not_cut_off(gateway: RunningGateway) -> None:
    """Nor where the client has sent a line's end too many, as some do."""
    body = json.dumps({**CHAT, "stream": True}).encode()
    hesitate.set()
    with closing(connected(gateway)) as connection:
        connection.sendall(head_of(gateway, len(body)) + body + b"\r\n")
        assert b"[DONE]" in until_closed(connection)


def test_bodies_that_wait_to_be_read_are_bounded_together(gateway: RunningGateway) -> None:
    """Each is small enough, none is complete, and none is a request in progress yet."""
    held: list[socket.socket] = []
    try:
        for _ in range(8):
            connection = connected(gateway)
            held.append(connection)
            connection.sendall(head_of(gateway, 1_000_000))
            with suppress(ConnectionError):
                connection.sendall(b" " * 999_000)
        answers = [until_closed(connection)[:12] for connection in held]
    finally:
        for connection in held:
            connection.close()
    assert answers.count(b"HTTP/1.1 503") >= 4
    assert Hand(gateway, "app").post("/v1/chat/completions", CHAT).status_code == 200  # and it is forgotten again


def test_one_tenant_leaves_room_for_the_others() -> None:
    bodies = Bodies(100)
    assert bodies.take("a", 75)
    assert not bodies.take("a", 1)
    assert bodies.take("b", 25)
    assert not bodies.take("b", 1)
    bodies.give("a", 75)
    bodies.give("b", 25)
    assert bodies.held == 0
    assert bodies.take("b", 75)
