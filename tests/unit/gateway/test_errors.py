"""Errors: the table of the contract, in both shapes, and nothing of what was sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from fastapi import FastAPI, Query
from httpx import ASGITransport, AsyncClient
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.responses import StreamingResponse
from starlette.types import Message

from gateway import errors
from gateway.error_responses import Containment, install_error_handlers, invalid_fields, is_problem_path
from gateway.errors import ApiError, ResponseBroken

GOLDEN = Path(__file__).parents[2] / "golden" / "errors.json"
CANARY = "canary-4929"

TABLE = [
    errors.invalid_api_key(),
    errors.policy_denied(),
    errors.permission_denied(),
    errors.suspended(),
    errors.model_not_found(),
    errors.not_found(),
    errors.receipt_not_found(),
    errors.method_not_allowed(),
    errors.content_filter("secrets-in"),
    errors.context_length_exceeded(1024, 1500),
    errors.rate_limit_exceeded("contact-centre", 0.2),
    errors.insufficient_quota("contact-centre"),
    errors.body_too_large(4096),
    errors.headers_too_large(4096),
    errors.invalid_request("the prompt is empty", "prompt"),
    errors.audit_unavailable(),
    errors.overloaded(),
    errors.draining(),
    errors.engine_unavailable(),
    errors.internal_error(),
]


def as_golden(error: ApiError) -> dict[str, Any]:
    return {
        "status": error.status,
        "headers": error.headers,
        "openai": json.loads(error.openai_body),
        "problem": json.loads(error.problem_body),
    }


def test_the_table_is_written_as_it_always_was() -> None:
    assert [as_golden(error) for error in TABLE] == json.loads(GOLDEN.read_text())


def test_the_contracts_codes_have_the_contracts_statuses() -> None:
    found = {error.code: error.status for error in TABLE}
    contract = {
        "invalid_api_key": 401,
        "policy_denied": 403,
        "suspended": 403,
        "model_not_found": 404,
        "content_filter": 400,
        "context_length_exceeded": 400,
        "rate_limit_exceeded": 429,
        "insufficient_quota": 429,
        "audit_unavailable": 503,
        "overloaded": 503,
        "draining": 503,
        "engine_unavailable": 503,
    }
    assert contract.items() <= found.items()
    assert errors.insufficient_quota("x").headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("seconds", "header"), [(0, "1"), (-5, "1"), (0.2, "1"), (1.01, "2"), (1e9, "86400"), (float("inf"), "86400")]
)
def test_retry_after_is_a_whole_number_of_seconds_within_a_day(seconds: float, header: str) -> None:
    assert errors.rate_limit_exceeded("x", seconds).headers["retry-after"] == header


@pytest.mark.parametrize(
    ("path", "is_problem"),
    [
        ("/audit", True),
        ("/audit/requests", True),
        ("/audit:verify", True),
        ("/admin/tenants/a", True),
        ("/auditor", False),
        ("/v1/audit", False),
        ("/", False),
    ],
)
def test_officers_and_admins_read_problems_and_applications_read_openai(path: str, is_problem: bool) -> None:
    assert is_problem_path(path) is is_problem


# --- validation ---


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["a", "b"]
    count: int = Field(0, ge=0, le=4)


class NamedProblem(ValueError):
    name = "tools"


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: list[Inner] = []
    labels: dict[str, int] = {}
    pattern: str = Field("a", pattern="^a+$")
    tools: list[int] = []

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[int]) -> list[int]:
        if tools:
            raise NamedProblem("`tools` is not supported by this server; leave it out")
        return tools


def refusal(body: object) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(body)
    return invalid_fields(caught.value, Body)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"inner": [{"kind": CANARY}]}, "inner.0.kind", "`inner.0.kind`: input should be 'a' or 'b'"),
        ({"inner": [{}]}, "inner.0.kind", "`inner.0.kind`: field required"),
        ({"inner": [{"kind": "a", CANARY: 1}]}, "inner.0", "an unknown field stands in `inner.0`; leave it out"),
        ({CANARY: 1}, None, "an unknown field stands in the body; leave it out"),
        (
            {"labels": {CANARY: "x"}},
            "labels",
            "`labels`: input should be a valid integer, unable to parse string as an integer",
        ),
        ({"pattern": CANARY}, "pattern", "`pattern`: is not valid"),
        ({"tools": [1]}, "tools", "`tools` is not supported by this server; leave it out"),
        (
            {"inner": [{"kind": "a", "count": 9}]},
            "inner.0.count",
            "`inner.0.count`: input should be less than or equal to 4",
        ),
        (CANARY, None, "the body: input should be a valid dictionary or instance of Body"),
        ([CANARY], None, "the body: input should be a valid dictionary or instance of Body"),
    ],
)
def test_validation_names_our_fields_and_repeats_nothing(body: object, param: str | None, message: str) -> None:
    error = refusal(body)
    assert (error.status, error.param, error.message) == (400, param, message)
    assert CANARY not in error.openai_body.decode()


# --- through a real app ---


def make_app() -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.get("/v1/named")
    async def named() -> None:
        raise errors.overloaded().with_headers({"probity-receipt": "r"})

    @app.get("/v1/unforeseen")
    async def unforeseen() -> None:
        raise RuntimeError(CANARY)

    @app.get("/admin/unforeseen")
    async def unforeseen_for_admins() -> None:
        raise RuntimeError(CANARY)

    @app.get("/v1/broken")
    async def broken() -> StreamingResponse:
        async def pieces() -> Any:
            yield b"one"
            raise RuntimeError(CANARY)

        return StreamingResponse(pieces())

    @app.get("/v1/number")
    async def number(limit: int = Query(ge=1, le=9)) -> int:
        return limit

    @app.post("/v1/body")
    async def with_body(body: Body) -> Body:
        return body

    install_error_handlers(app)
    return app


async def get(path: str, method: str = "GET", **kwargs: Any) -> tuple[int, Any, dict[str, str]]:
    transport = ASGITransport(Containment(make_app()))
    async with AsyncClient(transport=transport, base_url="http://probity") as client:
        response = await client.request(method, path, **kwargs)
    assert CANARY not in response.text
    return response.status_code, response.json(), dict(response.headers)


async def test_a_named_error_keeps_its_headers() -> None:
    status, body, headers = await get("/v1/named")
    assert (status, body["error"]["code"]) == (503, "overloaded")
    assert (headers["retry-after"], headers["probity-receipt"]) == ("1", "r")


@pytest.mark.parametrize("path", ["/v1/unforeseen", "/admin/unforeseen"])
async def test_what_nobody_foresaw_is_a_500_that_says_nothing(path: str) -> None:
    status, body, headers = await get(path)
    assert status == 500
    assert "internal_error" in json.dumps(body)
    assert headers["content-type"] == ("application/problem+json" if path.startswith("/admin") else "application/json")


async def test_routes_that_are_not_there_are_named_in_the_shape_of_their_place() -> None:
    assert (await get("/v1/nothing"))[1]["error"]["code"] == "not_found"
    assert (await get(f"/audit/{CANARY}"))[1]["title"] == "not_found"
    status, body, headers = await get("/v1/named", "DELETE")
    assert (status, body["error"]["code"], headers["allow"]) == (405, "method_not_allowed", "GET")


@pytest.mark.parametrize("query", [f"limit={CANARY}", "limit=99", "", f"limit=1&limit={CANARY}"])
async def test_a_parameter_is_refused_by_its_name(query: str) -> None:
    status, body, _ = await get(f"/v1/number?{query}")
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "invalid_request", "limit")


@pytest.mark.parametrize(
    "content", [b"{", b'{"canary-4929": 1}', b'{"pattern": "canary-4929"}', b"\xff", b"canary-4929"]
)
async def test_a_body_that_the_framework_reads_is_refused_without_an_echo(content: bytes) -> None:
    status, body, _ = await get("/v1/body", "POST", content=content, headers={"content-type": "application/json"})
    assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_a_response_that_breaks_is_cut_and_carries_no_cause() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.get_running_loop().create_future()  # the client waits
        raise AssertionError("never")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/broken",
        "headers": [],
        "query_string": b"",
        "http_version": "1.1",
    }
    with pytest.raises(ResponseBroken) as caught:
        await Containment(make_app())(scope, receive, send)
    assert caught.value.__suppress_context__
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["more_body"] is True
