"""What asks the model goes straight to its handler, and everything else through the app; both refuse alike."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute

from gateway.error_responses import install_error_handlers
from gateway.errors import model_not_found
from gateway.routes import inference
from gateway.short_way import ShortWay

ASKED = "/v1/chat/completions"


def served() -> tuple[FastAPI, ShortWay]:
    """Return an app that answers a POST to ASKED and a way that answers it otherwise."""
    app = FastAPI()
    install_error_handlers(app)

    @app.post(ASKED)
    async def long_way() -> str:
        return "long"

    async def short_way(request: Request) -> Response:
        wish = await request.body()
        if wish == b"refused":
            raise model_not_found()
        if wish == b"broken":
            raise ZeroDivisionError
        return Response(b"short of " + type(request.app).__name__.encode())

    return app, ShortWay(app, {ASKED: short_way})


def ask(way: ShortWay | FastAPI, method: str, path: str, content: bytes = b"") -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(way)  # type: ignore[arg-type]  # starlette's types of a scope are wider
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, content=content)

    return asyncio.run(one())


def test_a_post_to_an_exact_path_reaches_its_handler_and_the_handler_finds_the_app() -> None:
    _, way = served()
    assert ask(way, "POST", ASKED).text == "short of FastAPI"
    assert ask(way, "POST", f"{ASKED}?a=b").text == "short of FastAPI"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ASKED), ("PUT", ASKED), ("POST", "/v1/chat"), ("POST", "/v1/chat/completions/1")]
)
def test_everything_else_is_the_apps(method: str, path: str) -> None:
    app, way = served()
    by_way, by_app = ask(way, method, path), ask(app, method, path)
    assert by_way.status_code in (404, 405)
    assert (by_way.status_code, by_way.content, by_way.headers) == (by_app.status_code, by_app.content, by_app.headers)


def test_a_refusal_is_answered_as_the_app_answers_it() -> None:
    app, way = served()

    @app.post("/v1/other")
    async def refuses() -> None:
        raise model_not_found()

    refused, same = ask(way, "POST", ASKED, b"refused"), ask(app, "POST", "/v1/other")
    assert refused.status_code == 404
    assert (refused.status_code, refused.content, refused.headers) == (same.status_code, same.content, same.headers)


def test_what_is_no_refusal_goes_on_outwards() -> None:
    _, way = served()
    with pytest.raises(ZeroDivisionError):
        ask(way, "POST", ASKED, b"broken")


def test_every_path_that_asks_the_model_has_a_handler() -> None:
    assert set(inference.handlers()) == {route.path for route in inference.router.routes if isinstance(route, APIRoute)}
