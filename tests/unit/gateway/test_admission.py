"""Admission: the size and the kind of a body, before anyone reads its meaning."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request
from httpx import ASGITransport, AsyncClient, Response

from gateway.admission import Admission, parse_json
from gateway.bodies import Bodies
from gateway.error_responses import Containment, install_error_handlers
from gateway.errors import ApiError

MAX_BODY = 2048
MAX_HEADERS = 4096
JSON = {"content-type": "application/json"}


def make_app() -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.post("/v1/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.post("/admin/size")
    async def size_for_admins(request: Request) -> int:
        return len(await request.body())

    @app.get("/v1/nothing")
    async def nothing() -> int:
        return 0

    install_error_handlers(app)
    return app


async def ask(path: str = "/v1/size", method: str = "POST", **kwargs: object) -> Response:
    transport = ASGITransport(Containment(Admission(make_app(), MAX_BODY, MAX_HEADERS, Bodies(1 << 20))))
    async with AsyncClient(transport=transport, base_url="http://probity") as client:
        return await client.request(method, path, **kwargs)  # type: ignore[arg-type]


async def chunks(total: int, each: int = 100) -> AsyncIterator[bytes]:
    for start in range(0, total, each):
        yield b"x" * min(each, total - start)


async def test_a_body_of_the_largest_size_is_read() -> None:
    assert (await ask(content=b"x" * MAX_BODY, headers=JSON)).json() == MAX_BODY
    assert (await ask(content=chunks(MAX_BODY), headers=JSON)).json() == MAX_BODY


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("size", [MAX_BODY + 1, 50 * MAX_BODY])
async def test_a_larger_body_is_413_declared_or_not(streamed: bool, size: int) -> None:
    response = await ask(content=chunks(size) if streamed else b"x" * size, headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


async def test_a_length_that_lies_gets_no_more_through() -> None:
    response = await ask(content=chunks(MAX_BODY + 1), headers={**JSON, "content-length": "10"})
    assert response.status_code == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "", " 5", "5, 6", "0x10", "9" * 19])
async def test_a_length_that_is_no_number_is_400(length: str) -> None:
    response = await ask(content=chunks(5), headers={**JSON, "content-length": length})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")


async def test_admins_read_a_problem() -> None:
    response = await ask("/admin/size", content=b"x" * (MAX_BODY + 1), headers=JSON)
    assert (response.status_code, response.json()["title"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
async def test_json_is_recognised(kind: str) -> None:
    assert (await ask(content=b"{}", headers={"content-type": kind})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/jsonp"},
        {"content-type": "text/plain, application/json"},
        {**JSON, "content-encoding": "gzip"},
    ],
)
async def test_a_body_of_another_kind_is_400(headers: dict[str, str]) -> None:
    response = await ask(content=b"{}", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")


async def test_two_kinds_at_once_are_400() -> None:
    headers = [("content-type", "application/json"), ("content-type", "text/plain")]
    assert (await ask(content=b"{}", headers=headers)).status_code == 400


async def test_a_request_without_a_body_needs_no_kind() -> None:
    assert (await ask("/v1/nothing", "GET")).status_code == 200
    assert (await ask(content=b"")).status_code == 200


async def test_large_headers_are_431() -> None:
    response = await ask("/v1/nothing", "GET", headers={"x-pad": "x" * MAX_HEADERS})
    assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "body", [b'{"canary":1,"canary":2}', b'["canary", NaN]', b'{"canary": 1e999}', b"canary", b"[" * 65 + b"]" * 65]
)
def test_unusable_json_is_a_400_that_repeats_nothing(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    assert "canary" not in caught.value.openai_body.decode()


def test_usable_json_is_returned() -> None:
    assert parse_json(json.dumps({"a": [1, "ü", None]}).encode()) == {"a": [1, "ü", None]}
