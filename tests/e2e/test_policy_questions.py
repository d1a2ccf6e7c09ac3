"""What an application asks of its own policy: the decision alone, on record like any request, and its own limits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand, database_locked, leaves, part
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL

CARD = "4111 1111 1111 1111"
OBLIGATIONS = "guardrails: [cards-in, no-keys], limits: some, params: small"
SECTIONS = """
guardrails:
  cards-in: {detector: pii, stage: input, action: redact, entities: [card], on_error: block}
  no-keys: {detector: secrets, stage: input, action: block, on_error: block}
limits:
  some: {per_subject: {requests_per_minute: 4}, per_tenant: {tokens_per_day: 100000}}
params:
  small: {temperature: {max: "0.7"}, on_excess: clamp}
"""


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def gateway(tmp_path: Path, engine: ScriptedEngine) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path, engine, obligations=OBLIGATIONS, sections=SECTIONS) as running:
        yield running


def about(text: str, action: str = "chat.completions", **more: object) -> dict[str, object]:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
    return {"action": action, "request": asked}


def explain(hand: Hand, body: object) -> httpx.Response:
    return hand.post("/v1/policy/explain", body)


def test_an_allow_is_explained_and_on_record_and_nothing_is_generated(
    gateway: RunningGateway, engine: ScriptedEngine
) -> None:
    app = Hand(gateway, "app")
    answer = explain(app, about(f"pay {CARD}", temperature=1.5, max_tokens=7))
    shown = answer.raise_for_status().json()
    assert (shown["effect"], shown["error"]) == ("allow", None)
    assert shown["reasons"] == [{"code": "rule", "rule": "everybody"}]
    assert shown["obligations"]["adjusted"] == [{"param": "temperature", "old": "1.5", "new": "0.7"}]
    assert shown["guardrails"] == [{"id": "cards-in", "verdict": "redacted"}, {"id": "no-keys", "verdict": "passed"}]
    assert CARD not in answer.text
    received, completed = leaves(gateway)[-2:]
    assert (received.type.value, completed.type.value) == ("request.received", "request.completed")
    assert received.request == completed.request == answer.headers["x-request-id"]
    assert received.body["action"] == "policy.explain"
    assert CARD in part(gateway, received, "prompt").decode()
    assert "[CARD]" in part(gateway, received, "prompt_to_model").decode()
    assert answer.headers["probity-receipt"].split(";")[2] == str(completed.writer_seq)
    assert engine.prompts == []
    assert gateway.rooms.pipeline.governed == 0


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (about("the key is AKIAIOSFODNN7EXAMPLE"), "content_filter"),
        (about("hello", model="nobody-s"), "model_not_found"),
        (about("hello " * 2_000), "context_length_exceeded"),
    ],
)
def test_a_denial_is_explained_with_what_the_caller_would_be_told(
    gateway: RunningGateway, engine: ScriptedEngine, body: dict[str, object], code: str
) -> None:
    app = Hand(gateway, "app")
    shown = explain(app, body).raise_for_status().json()
    told = app.post("/v1/chat/completions", body["request"])
    assert (shown["effect"], shown["obligations"]) == ("deny", None)
    assert shown["error"] == {"status": told.status_code, **told.json()["error"]}
    assert shown["error"]["code"] == code
    first, second = leaves(gateway, type="request.denied")
    assert (first.body["action"], second.body["action"]) == ("policy.explain", "chat.completions")
    assert first.body["decision"] == second.body["decision"]
    assert engine.prompts == []


def test_it_is_decided_on_the_action_that_is_asked_about(gateway: RunningGateway) -> None:
    app = Hand(gateway, "app")
    for action, request in (
        ("completions", {"model": MODEL, "prompt": "hello"}),
        ("responses", {"model": MODEL, "input": "hello"}),
        ("embeddings", {"model": MODEL, "input": ["hello"]}),
    ):
        assert explain(app, {"action": action, "request": request}).json()["effect"] == "allow"


def test_it_counts_as_a_request_and_is_refused_when_there_are_too_many(gateway: RunningGateway) -> None:
    app = Hand(gateway, "app")
    effects = [explain(app, about("hello")).json() for _ in range(5)]
    assert [one["effect"] for one in effects] == ["allow"] * 4 + ["deny"]
    assert effects[-1]["error"]["code"] == "rate_limit_exceeded"
    gateway.rooms.ledger.check_integrity()


def test_what_cannot_be_put_on_record_is_not_explained(tmp_path: Path, engine: ScriptedEngine) -> None:
    overrides: dict[str, Any] = {"audit__append_timeout_s": 0.3}
    with running_gateway(tmp_path, engine, **overrides) as gateway:
        app = Hand(gateway, "app")
        with database_locked(gateway):
            for body in (about("hello"), about("hello", model="nobody-s")):
                answer = explain(app, body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_unavailable")


def test_a_question_that_is_none_is_refused_and_not_repeated(gateway: RunningGateway) -> None:
    app = Hand(gateway, "app")
    canary = "canary-3f1b"
    for body in (canary, {canary: 1}, about("x", action=canary), {"request": {canary: canary}}, {"request": canary}):
        answer = explain(app, body)
        assert answer.status_code == 400
        assert canary not in answer.text
    assert explain(Hand(gateway, "auditor"), about("hello")).status_code == 403


def test_an_explanation_is_no_answer_and_cannot_be_replayed(gateway: RunningGateway) -> None:
    request_id = explain(Hand(gateway, "app"), about("hello")).headers["x-request-id"]
    auditor = Hand(gateway, "auditor")
    assert auditor.get(f"/audit/requests/{request_id}").json()["status"] == "completed"
    assert auditor.post(f"/audit/requests/{request_id}:replay", {}).status_code == 409


def test_the_limits_that_are_shown_are_the_caller_s_own(gateway: RunningGateway) -> None:
    app, other = Hand(gateway, "app"), Hand(gateway, "app", subject="noor@test.example")
    app.ask("hello")
    app.ask("hello")
    other.ask("hello")

    def used(hand: Hand) -> dict[str, int]:
        data = hand.get("/v1/usage").raise_for_status().json()["data"]
        assert all(one["remaining"] == one["maximum"] - one["used"] for one in data)
        return {one["kind"]: one["used"] for one in data}

    assert used(app)["requests_per_minute"] == 2
    assert used(other)["requests_per_minute"] == 1
    assert used(app)["tokens_per_day"] == used(other)["tokens_per_day"] > 0
    assert Hand(gateway, "app", tenant="never-seen").get("/v1/usage").json() == {"object": "list", "data": []}
    assert Hand(gateway, "auditor").get("/v1/usage").status_code == 403


def test_the_interface_is_described_whole_for_machines_and_people(gateway: RunningGateway) -> None:
    described = httpx.get(f"{gateway.url}/openapi.json").raise_for_status().json()
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(described)))
    assert referred <= described["components"]["schemas"].keys()
    assert {"ChatRequest", "ResponsesRequest", "ExplainBody"} <= referred
    page = httpx.get(f"{gateway.url}/docs").raise_for_status()
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for outside in ("<script", "http://", "https://", "onclick", "style="):
        assert outside not in page.text
    for path in described["paths"]:
        assert path in page.text
