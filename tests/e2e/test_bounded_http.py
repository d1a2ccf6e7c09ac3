"""What a stranger sends without end is not kept, and a body of any shape is still read."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL

HEAD = b"GET /livez HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "many headers": (HEAD, b"x: " + b"a" * 1021),
    "one header": (HEAD + b"x: ", b"a" * 1024),
    "a name": (HEAD, b"a" * 1024),
    "blank lines": (b"", b"\r\n" * 512),
    "a chunk's extension": (CHUNKED + b"1;", b"a" * 1024),
    "a trailer": (CHUNKED + b"0\r\nx: ", b"a" * 1024),
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("bounded"), ScriptedEngine()) as running:
        yield running


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_request_that_never_ends_its_head_is_cut_off(gateway: RunningGateway, kind: str) -> None:
    begin, more = ENDLESS[kind]
    answered = b""
    with (
        socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=10) as connection,
        suppress(ConnectionError),
    ):
        connection.sendall(begin)
        for _ in range(2_000):
            connection.sendall(more)
        while piece := connection.recv(4096):  # left open, it would time out
            answered += piece
    assert answered[:12] in (b"", b"HTTP/1.1 431", b"HTTP/1.1 400", b"HTTP/1.1 401")


def test_headers_that_end_are_refused_by_admission_with_an_id(gateway: RunningGateway) -> None:
    app = Hand(gateway, "app")
    answer = app.http.get("/livez", headers={"x": "a" * 40_000})
    assert answer.status_code == 431
    assert "x-request-id" in answer.headers


def test_a_long_body_in_the_smallest_chunks_is_read(gateway: RunningGateway) -> None:
    text = "a" * 300_000
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "{text}"}}]}}'.encode()
    pieces = (body[at : at + 3] for at in range(0, len(body), 3))
    app = Hand(gateway, "app")
    answer = app.http.post("/v1/chat/completions", content=pieces, headers={"content-type": "application/json"})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
