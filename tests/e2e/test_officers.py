"""Officers on the real app: what they see, what they do not, and that every look is on record before it is answered."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from audit.checkpoint import open_checkpoint
from audit.merkle import check_consistency, check_inclusion
from audit.trust import read_trust
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import WINDOW, Hand, database_locked, identities, leaves, part
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL, TENANT, activate_policy, policy_text

OTHER = "other-tenant"
SECRET = "the blue folder of Mr Hansen"  # said in a prompt; must not be seen without a reveal


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    engine = ScriptedEngine(lambda prompt: "an answer of several words", chunk=4)
    overrides: dict[str, Any] = {"audit__append_timeout_s": 0.4}
    with running_gateway(tmp_path_factory.mktemp("officers"), engine, **overrides) as running:
        activate_policy(running.app, policy_text(engine.model.digest, tenant=OTHER))
        yield running


@pytest.fixture(scope="module")
def app(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "app", purpose="testing")


@pytest.fixture(scope="module")
def other_app(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "app", tenant=OTHER)


@pytest.fixture(scope="module")
def auditor(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "auditor", subject="otto@test.example")


@pytest.fixture(scope="module")
def platform(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "auditor", tenant="*", subject="petra@platform.example")


def asked_until(hand: Hand, path: str, **params: Any) -> httpx.Response:
    """Ask until a checkpoint covers it; that takes up to a second."""
    for _ in range(200):
        response = hand.get(path, **params)
        if response.status_code != 503:
            return response
        time.sleep(0.05)
    raise AssertionError("never signed")


# --- lists ---


def test_a_list_shows_the_tenant_s_requests_newest_first_and_nothing_said(app: Hand, auditor: Hand) -> None:
    first, second = app.ask(SECRET), app.ask(SECRET, model="no-such-model")
    answer = auditor.get("/audit/requests", **WINDOW)
    assert answer.status_code == 200
    rows = answer.json()["requests"]
    ids = [row["request_id"] for row in rows]
    assert ids.index(second) < ids.index(first)
    by_id = {row["request_id"]: row for row in rows}
    assert by_id[first]["status"] == "completed"
    assert by_id[second]["status"] == "denied"
    assert {row["tenant"] for row in rows} == {TENANT}
    assert SECRET not in answer.text
    assert app.subject not in answer.text


def test_a_list_is_read_in_slices_without_loss_or_repetition(app: Hand, auditor: Hand) -> None:
    asked = [app.ask(f"slice {number}") for number in range(7)]
    seen: list[str] = []
    after = None
    while True:
        slice_ = auditor.get("/audit/requests", **WINDOW, limit=3, **({} if after is None else {"after": after})).json()
        seen += [row["request_id"] for row in slice_["requests"]]
        after = slice_["after"]
        if after is None:
            break
    assert len(seen) == len(set(seen))
    assert [request_id for request_id in seen if request_id in asked] == asked[::-1]


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        ({"status": "denied"}, False),
        ({"status": "completed"}, True),
        ({"decision": "deny"}, False),
        ({"model": MODEL}, True),
        ({"model": "another"}, False),
        ({"purpose": "testing"}, True),
        ({"purpose": "another"}, False),
        ({"subject": "mia@test.example"}, True),
        ({"subject": "somebody@else.example"}, False),
        ({"client": "svc-crm"}, False),
        ({"guardrail": "pii-in"}, False),
        ({"tenant": TENANT}, True),
    ],
)
def test_filters_choose(app: Hand, auditor: Hand, filters: dict[str, str], fits: bool) -> None:
    request_id = app.ask("to be found")
    rows = auditor.get("/audit/requests", **WINDOW, **filters, limit=500).json()["requests"]
    assert (request_id in [row["request_id"] for row in rows]) is fits


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"from": "2026-01-01T00:00:00Z"},
        {"from": "yesterday", "to": "2026-02-01T00:00:00Z"},
        {"from": "2026-02-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"},
        {"from": "9999-12-31T23:59:59-12:00", "to": "9999-12-31T23:59:59-13:00"},
        {"from": "2026-02-01T00:00:00", "to": "2026-03-01T00:00:00"},
        {**WINDOW, "limit": "0"},
        {**WINDOW, "limit": "501"},
        {**WINDOW, "status": SECRET},
        {**WINDOW, "client": SECRET},
        {**WINDOW, "purpose": SECRET},
        {**WINDOW, "after": SECRET},
        {**WINDOW, "unknown": SECRET},
    ],
)
def test_a_wrong_filter_is_a_problem_that_repeats_nothing(
    gateway: RunningGateway, auditor: Hand, params: dict[str, str]
) -> None:
    before = len(leaves(gateway))
    answer = auditor.get("/audit/requests", **params)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert SECRET not in answer.text
    assert "yesterday" not in answer.text
    assert len(leaves(gateway)) == before


# --- every look is on record ---


def test_a_look_is_on_record_with_who_and_what_and_no_person_in_the_leaf(
    gateway: RunningGateway, app: Hand, auditor: Hand
) -> None:
    app.ask("to be looked at")
    rows = auditor.get("/audit/requests", **WINDOW, status="completed", subject=app.subject).json()["requests"]
    look = leaves(gateway, type="audit.read")[-1]
    assert look.body["view"] == "requests"
    assert look.body["rows"] == len(rows)
    assert look.body["filters"]["status"] == "completed"  # type: ignore[index, call-overload]
    assert look.body["actor"]["roles"] == ["auditor"]  # type: ignore[index, call-overload]
    encoded = look.encode()
    assert auditor.subject.encode() not in encoded
    assert app.subject.encode() not in encoded
    named = identities(gateway, look)
    assert named["subject"] == auditor.subject
    assert named["asked_about"] == app.subject


def test_what_an_officer_types_as_a_filter_or_a_case_is_encrypted(
    gateway: RunningGateway, app: Hand, auditor: Hand
) -> None:
    """A leaf cannot be erased, and anything may be typed where a name is expected, such as an address."""
    typed = {"client": "mia.k@test.example", "model": "the.model.of.mr-hansen", "purpose": "mias-divorce",
             "guardrail": "no-hansen", "tenant": TENANT}  # fmt: skip
    request_id = app.ask("to be looked at")
    assert auditor.get("/audit/requests", **WINDOW, **typed).json()["requests"] == []
    look = leaves(gateway, type="audit.read")[-1]
    auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "a complaint", "case": "hansen-divorce"})
    revealed = leaves(gateway, type="audit.revealed")[-1]
    for leaf in (look, revealed):
        assert not [word for word in ("mia", "hansen", "divorce") if word.encode() in leaf.encode()]
    assert json.loads(part(gateway, look, "typed")) == typed
    assert part(gateway, revealed, "case") == b"hansen-divorce"


@pytest.mark.parametrize("path", ["/audit/requests/{id}", "/audit/checkpoint", "/audit/proofs/inclusion?leaf_index=0"])
def test_every_view_is_on_record(gateway: RunningGateway, app: Hand, auditor: Hand, path: str) -> None:
    request_id = app.ask("viewed")
    assert asked_until(auditor, "/audit/checkpoint").status_code == 200
    before = len(leaves(gateway, type="audit.read"))
    assert auditor.get(path.format(id=request_id)).status_code == 200
    assert len(leaves(gateway, type="audit.read")) == before + 1


def test_a_look_that_finds_nothing_is_on_record_where_the_officer_belongs(
    gateway: RunningGateway, auditor: Hand, platform: Hand
) -> None:
    empty = {"from": "2001-01-01T00:00:00Z", "to": "2001-02-01T00:00:00Z"}
    assert auditor.get("/audit/requests", **empty).json()["requests"] == []
    assert leaves(gateway, type="audit.read")[-1].body["rows"] == 0
    assert platform.get("/audit/requests", **empty, tenant="never-heard-of").json()["requests"] == []
    assert leaves(gateway, "system", "audit.read")[-1].body["rows"] == 0
    assert leaves(gateway, "never-heard-of") == []


def test_when_the_look_cannot_be_put_on_record_nothing_is_shown(
    gateway: RunningGateway, app: Hand, auditor: Hand
) -> None:
    request_id = app.ask(SECRET)
    with database_locked(gateway):
        answers = [
            auditor.get("/audit/requests", **WINDOW),
            auditor.get(f"/audit/requests/{request_id}"),
            auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "an investigation"}),
        ]
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["title"] == "audit_unavailable"
        assert "retry-after" in answer.headers
        assert SECRET not in answer.text
        assert request_id not in answer.text
    assert auditor.get(f"/audit/requests/{request_id}").status_code == 200


# --- whose records ---


def test_an_officer_of_a_tenant_learns_nothing_of_another(
    gateway: RunningGateway, other_app: Hand, auditor: Hand
) -> None:
    foreign = other_app.ask(SECRET)
    unknown = "0193f0c2-0000-7000-8000-000000000000"
    before = len(leaves(gateway, OTHER))
    for request_id in (foreign, unknown, "not-an-id"):
        for answer in (
            auditor.get(f"/audit/requests/{request_id}"),
            auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "an investigation"}),
            auditor.post(f"/audit/requests/{request_id}:replay", {"mode": "regenerate"}),
        ):
            assert answer.status_code == 404
            assert answer.json() == auditor.get(f"/audit/requests/{unknown}").json()
    assert auditor.get("/audit/requests", **WINDOW, tenant=OTHER).status_code == 403
    assert auditor.get("/audit/checkpoint", tenant=OTHER).status_code == 403
    assert auditor.get("/audit/checkpoint", tenant="system").status_code == 403
    assert auditor.get("/audit/proofs/inclusion", tenant=OTHER, leaf_index=0).status_code == 403
    assert auditor.get("/audit/proofs/consistency", tenant=OTHER, old=1, new=2).status_code == 403
    assert len(leaves(gateway, OTHER)) == before


def test_an_officer_of_the_platform_is_on_record_in_the_log_of_every_tenant_seen(
    gateway: RunningGateway, app: Hand, other_app: Hand, platform: Hand
) -> None:
    app.ask("one")
    other_app.ask("two")
    rows = platform.get("/audit/requests", **WINDOW, limit=500).json()["requests"]
    for tenant in (TENANT, OTHER):
        look = leaves(gateway, tenant, "audit.read")[-1]
        assert look.body["rows"] == sum(row["tenant"] == tenant for row in rows)
        assert identities(gateway, look, tenant)["subject"] == platform.subject


@pytest.mark.parametrize("role", ["app", "admin", "policy_author", "policy_approver", "operator", "contact-centre"])
def test_nobody_else_sees_records(gateway: RunningGateway, app: Hand, role: str) -> None:
    request_id = app.ask("not for you")
    hand = Hand(gateway, role, subject=f"{role}@test.example")
    assert hand.get("/audit/requests", **WINDOW).status_code == 403
    assert hand.get(f"/audit/requests/{request_id}").status_code == 403
    assert hand.post(f"/audit/requests/{request_id}:reveal", {"reason": "curiosity"}).status_code == 403
    assert hand.post(f"/audit/requests/{request_id}:replay", {}).status_code == 403
    assert hand.get("/audit/checkpoint").status_code == 403


# --- one request ---


def test_a_story_is_whole_and_says_nothing_that_was_said(app: Hand, auditor: Hand) -> None:
    request_id = app.ask(SECRET, temperature=0.5, seed=7)
    answer = auditor.get(f"/audit/requests/{request_id}")
    story = answer.json()
    assert story["status"] == "completed"
    assert story["decision"]["effect"] == "allow"
    assert story["sampling"]["seed"] == "7"
    assert story["sampling"]["temperature"] == "0.5"
    assert [record["type"] for record in story["records"]] == ["request.received", "request.completed"]
    assert SECRET not in answer.text
    assert "several words" not in answer.text


def test_revealed_content_is_what_was_said_and_the_reason_is_on_record(
    gateway: RunningGateway, app: Hand, auditor: Hand
) -> None:
    request_id = app.ask(SECRET)
    reason = "complaint of Mr Hansen"
    body = {"reason": reason, "case": "C-2026/17"}
    content = auditor.post(f"/audit/requests/{request_id}:reveal", body).json()
    assert SECRET in content["prompt"]
    assert SECRET in content["prompt_to_model"]
    assert content["output"] == ["an answer of several words"]
    assert content["identities"]["subject"] == app.subject
    record = leaves(gateway, type="audit.revealed")[-1]
    assert record.body["request"] == request_id
    assert part(gateway, record, "case") == b"C-2026/17"
    assert reason.encode() not in record.encode()
    assert part(gateway, record, "reason") == reason.encode()
    assert identities(gateway, record)["subject"] == auditor.subject


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_told_of_tokens_is_revealed_with_what_was_said(
    gateway: RunningGateway, app: Hand, auditor: Hand, stream: bool
) -> None:
    request_id = app.ask("hello", logprobs=True, top_logprobs=1, max_tokens=3, stream=stream)
    content = auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "why those words"}).json()
    told = [[byte, -0.5, [[byte, -0.5]]] for byte in content["output"][0].encode()]
    assert content["logprobs"] == {"choices": [told], "prompt": []}
    plain = app.ask("hello")
    assert auditor.post(f"/audit/requests/{plain}:reveal", {"reason": "beside"}).json()["logprobs"] is None


def test_a_denied_prompt_can_be_revealed(app: Hand, auditor: Hand) -> None:
    request_id = app.ask(SECRET, model="no-such-model")
    content = auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "why was it denied"}).json()
    assert SECRET in content["prompt"]
    assert content["prompt_to_model"] is None
    assert content["output"] is None


@pytest.mark.parametrize("body", [{}, {"reason": ""}, {"reason": "  "}, {"reason": "x" * 1001}, {"reason": 7}, []])
def test_nothing_is_revealed_without_a_reason(app: Hand, auditor: Hand, body: Any) -> None:
    answer = auditor.post(f"/audit/requests/{app.ask(SECRET)}:reveal", body)
    assert answer.status_code == 400
    assert SECRET not in answer.text


# --- replay ---


def test_a_replay_is_identical_and_on_record(gateway: RunningGateway, app: Hand, auditor: Hand) -> None:
    request_id = app.ask("again", n=2, seed=11, max_tokens=9, stop=["words"])
    outcome = auditor.post(f"/audit/requests/{request_id}:replay", {"mode": "regenerate"}).json()
    assert outcome["outcome"] == "identical"
    assert [choice["outcome"] for choice in outcome["choices"]] == ["identical", "identical"]
    record = leaves(gateway, type="replay.performed")[-1]
    assert record.body["outcome"] == "identical"
    assert record.body["request"] == request_id


def test_a_denied_request_cannot_be_replayed_and_that_it_was_asked_is_on_record(
    gateway: RunningGateway, app: Hand, auditor: Hand
) -> None:
    request_id = app.ask("never", model="no-such-model")
    looks = len(leaves(gateway, type="audit.read"))
    answer = auditor.post(f"/audit/requests/{request_id}:replay", {})
    assert answer.status_code == 409
    assert answer.json()["title"] == "not_replayable"
    assert len(leaves(gateway, type="audit.read")) == looks + 1
    assert leaves(gateway, type="audit.read")[-1].body["filters"] == {"request": request_id}
    with database_locked(gateway):
        assert auditor.post(f"/audit/requests/{request_id}:replay", {}).status_code == 503


def test_that_content_was_erased_is_told_on_record_only(gateway: RunningGateway, app: Hand, auditor: Hand) -> None:
    request_id = app.ask(SECRET)
    (opening,) = (leaf for leaf in leaves(gateway, type="request.received") if leaf.request == request_id)
    reader = gateway.rooms.log.database.reader
    with reader.connect() as connection:
        query = text("SELECT DISTINCT key_id FROM content WHERE record_id = :record")
        keys = connection.execute(query, {"record": opening.record}).scalars().all()
    gateway.rooms.log.keystore.destroy(keys)
    looks = len(leaves(gateway, type="audit.read"))
    assert auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "is it gone"}).status_code == 410
    assert auditor.post(f"/audit/requests/{request_id}:replay", {}).status_code == 410
    views = [leaf.body["view"] for leaf in leaves(gateway, type="audit.read")[looks:]]
    assert views == ["reveal", "replay"]


def test_an_answer_that_comes_out_otherwise_is_called_different(tmp_path: Path) -> None:
    replies = iter(["the first answer", "the forged answer"])
    with running_gateway(tmp_path, ScriptedEngine(lambda prompt: next(replies))) as running:
        request_id = Hand(running, "app").ask("who are you")
        outcome = Hand(running, "auditor").post(f"/audit/requests/{request_id}:replay", {}).json()
    assert outcome["outcome"] == "different"
    assert outcome["first_difference"] == len("the f")


# --- proofs ---


def test_a_receipt_leads_to_a_leaf_under_the_signed_checkpoint(
    gateway: RunningGateway, app: Hand, auditor: Hand
) -> None:
    request_id = app.ask("prove it")
    receipts = app.get(f"/v1/receipts/{request_id}").json()["records"]
    trust = read_trust(gateway.rooms.settings.data_dir / "trust")
    for record in receipts:
        origin, writer, writer_seq, leaf_hash = record["receipt"].split(";")
        proof = asked_until(auditor, "/audit/proofs/inclusion", writer=writer, writer_seq=writer_seq).json()
        assert proof["leaf_hash"] == leaf_hash
        signed = open_checkpoint(proof["checkpoint"], origin, trust.logs[origin])
        hashes = [bytes.fromhex(hashed) for hashed in proof["hashes"]]
        check_inclusion(bytes.fromhex(leaf_hash), proof["leaf_index"], signed.size, hashes, signed.root)


def test_two_checkpoints_are_joined_by_a_consistency_proof(gateway: RunningGateway, app: Hand, auditor: Hand) -> None:
    trust = read_trust(gateway.rooms.settings.data_dir / "trust")
    origin = gateway.rooms.log.origin(TENANT)

    def signed() -> Any:
        return open_checkpoint(asked_until(auditor, "/audit/checkpoint").text, origin, trust.logs[origin])

    old = signed()
    app.ask("more")
    new = signed()
    while new.size == old.size:
        time.sleep(0.05)
        new = signed()
    proof = auditor.get("/audit/proofs/consistency", old=old.size, new=new.size).json()
    hashes = [bytes.fromhex(hashed) for hashed in proof["hashes"]]
    check_consistency(old.size, old.root, new.size, new.root, hashes)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"leaf_index": "0", "writer": "0" * 16, "writer_seq": "0"},
        {"writer": "0" * 16},
        {"writer_seq": "0"},
        {"leaf_index": "-1"},
        {"writer": SECRET, "writer_seq": "0"},
    ],
)
def test_a_proof_of_nothing_is_refused(auditor: Hand, params: dict[str, str]) -> None:
    answer = auditor.get("/audit/proofs/inclusion", **params)
    assert answer.status_code == 400
    assert SECRET not in answer.text


@pytest.mark.parametrize(("old", "new", "status"), [(0, 1, 400), (2, 1, 400), (1, 10**9, 404), (-1, 3, 400)])
def test_impossible_sizes_have_no_consistency_proof(auditor: Hand, old: int, new: int, status: int) -> None:
    assert auditor.get("/audit/proofs/consistency", old=old, new=new).status_code == status
