"""Denials after authentication are on record, with a receipt: also those that come before a policy is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.refusals import AT_ONCE
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import WINDOW, Hand, database_locked, identities, leaves
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    overrides: dict[str, Any] = {"audit__append_timeout_s": 1.5, "server__max_body_bytes": 4096}
    with running_gateway(tmp_path_factory.mktemp("refusals"), ScriptedEngine(), **overrides) as running:
        yield running


@pytest.fixture(scope="module")
def app(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "app")


def send(hand: Hand, kind: str) -> httpx.Response:
    match kind:
        case "too large, as the head says":
            return hand.http.post(PATH, content=b"x" * 5000, headers=JSON)
        case "too large, in pieces":
            return hand.http.post(PATH, content=iter([b"x" * 3000] * 2), headers=JSON)
        case "not called JSON":
            return hand.http.post(PATH, content=b"{}", headers={"content-type": "text/plain"})
        case "not JSON":
            return hand.http.post(PATH, content=b"{" + b"x" * 90, headers=JSON)
        case "of another form":
            return hand.post(PATH, {**CHAT, "no such field": 1})
        case _:
            return hand.http.post(PATH, json=CHAT, headers={"probity-purpose": "not a purpose"})


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("too large, as the head says", 413, "request_too_large"),
        ("too large, in pieces", 413, "request_too_large"),
        ("not called JSON", 400, "invalid_request"),
        ("not JSON", 400, "invalid_request"),
        ("of another form", 400, "invalid_request"),
        ("for no purpose", 400, "invalid_request"),
    ],
)
def test_a_question_that_makes_no_sense_is_on_record_without_a_prompt(
    gateway: RunningGateway, app: Hand, kind: str, status: int, code: str
) -> None:
    before = len(leaves(gateway))
    refused = send(app, kind)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    (denied,) = leaves(gateway)[before:]
    assert (denied.type.value, denied.request) == ("request.denied", refused.headers["x-request-id"])
    assert (denied.body["code"], denied.body["action"]) == (code, "chat.completions")
    assert refused.headers["probity-receipt"].startswith(f"{denied.log};{denied.writer};{denied.writer_seq};")
    assert [one.name for one in denied.parts] == ["identities"]
    assert identities(gateway, denied)["subject"] == "mia@test.example"
    assert len(denied.encode()) < 1200


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "embeddings", "policy/explain"])
def test_a_role_that_may_not_ask_is_refused_on_record(gateway: RunningGateway, path: str) -> None:
    for tenant in ("test-tenant", "*"):
        log = "system" if tenant == "*" else tenant
        before = len(leaves(gateway, log))
        refused = Hand(gateway, "auditor", tenant=tenant).post(f"/v1/{path}", CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        denied = leaves(gateway, log)[before:][-1]
        assert (denied.type.value, denied.body["action"]) == ("request.denied", path.replace("/", "."))


def test_an_officer_finds_the_refusal_and_its_story(gateway: RunningGateway, app: Hand) -> None:
    refused = send(app, "not JSON")
    auditor = Hand(gateway, "auditor")
    rows = auditor.get("/audit/requests", **WINDOW, decision="deny", limit=1).json()["requests"]
    assert rows[0]["request_id"] == refused.headers["x-request-id"]
    story = auditor.get(f"/audit/requests/{rows[0]['request_id']}").json()
    assert (story["status"], story["decision"]["policy"]) == ("denied", "none")
    content = auditor.post(f"/audit/requests/{rows[0]['request_id']}:reveal", {"reason": "what was it"}).json()
    assert content["prompt"] is None
    assert auditor.post(f"/audit/requests/{rows[0]['request_id']}:replay", {}).status_code == 409


def test_a_refusal_that_cannot_be_put_on_record_is_not_told(gateway: RunningGateway, app: Hand) -> None:
    with database_locked(gateway):
        for kind in ("not JSON", "not called JSON"):
            refused = send(app, kind)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_unavailable")


async def test_refusals_come_into_the_log_a_few_at_once(gateway: RunningGateway, app: Hand) -> None:
    """And what is too many is not on record: a write for each would make the overload worse."""
    headers = {"authorization": app.http.headers["authorization"]}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, trust_env=False, timeout=30) as http:
        with database_locked(gateway):
            asking = [http.post(PATH, content=b"x", headers=JSON) for _ in range(2 * AT_ONCE)]
            codes = [answer.json()["error"]["code"] for answer in await asyncio.gather(*asking)]
    assert set(codes) == {"audit_unavailable", "overloaded"}
    assert codes.count("audit_unavailable") >= AT_ONCE


def test_what_an_officer_may_not_see_is_on_record_as_a_look_at_nothing(gateway: RunningGateway, app: Hand) -> None:
    unknown = "01890000-0000-7000-8000-000000000000"
    own = app.ask("hello")
    stranger, auditor = Hand(gateway, "auditor", tenant="other-tenant"), Hand(gateway, "auditor")
    looks: list[tuple[str, httpx.Response, str, str, dict[str, str]]] = [
        ("test-tenant", auditor.get(f"/audit/requests/{unknown}"), "request", "not_found", {"request": unknown}),
        ("test-tenant", auditor.get("/audit/requests/mia@test.example"), "request", "not_found", {}),
        ("other-tenant", stranger.get(f"/audit/requests/{own}"), "request", "not_found", {"request": own}),
        (
            "other-tenant",
            stranger.get("/audit/checkpoint", tenant="test-tenant"),
            "checkpoint",
            "permission_denied",
            {},
        ),
        ("test-tenant", app.get("/audit/requests", **WINDOW), "requests", "permission_denied", {}),
        ("test-tenant", app.post(f"/audit/requests/{own}:reveal", {}), "reveal", "permission_denied", {"request": own}),
    ]
    for tenant, answer, view, code, filters in looks:
        assert answer.json()["title"] == code
        found = [
            look
            for look in leaves(gateway, tenant, "audit.read")
            if (look.body["view"], look.body.get("outcome"), look.body["filters"]) == (view, code, filters)
        ]
        assert found, (view, code)
        assert {look.body["rows"] for look in found} == {0}
        assert answer.headers["probity-receipt"].split(";")[0] == gateway.rooms.log.origin(tenant)
