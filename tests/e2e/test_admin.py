"""Administrators on the real app: changes against what was seen, with a reason, in one transaction with a record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy import text

from policies.document import MAX_FINDINGS, parse_policy
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand, database_locked, identities, leaves, part
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL, TENANT, policy_text

POLICY = f"/admin/tenants/{TENANT}/policy"
VERSIONS = f"{POLICY}/versions"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
REASON = "the yearly review"


@pytest.fixture
def gateway(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RunningGateway]:
    overrides: dict[str, Any] = getattr(request, "param", {})
    with running_gateway(tmp_path, ScriptedEngine(lambda prompt: "an answer"), **overrides) as running:
        yield running


@pytest.fixture
def author(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "policy_author", subject="paula@test.example")


@pytest.fixture
def approver(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "policy_approver", subject="quentin@test.example")


@pytest.fixture
def admin(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "admin", subject="ada@test.example")


@pytest.fixture
def app(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "app")


def text_of(gateway: RunningGateway, *, name: str = "changed", denied_role: str | None = None) -> str:
    """Return a policy that holds, with another name and perhaps one more rule."""
    text = policy_text(gateway.rooms.engine.model.digest).replace("name: test", f"name: {name}")
    if denied_role is not None:
        rule = f"rules:\n  - {{id: not-{denied_role}, effect: deny, when: {{roles_any: [{denied_role}]}}}}"
        text = text.replace("rules:", rule)
    return text


def etag(hand: Hand, path: str = VERSIONS) -> str:
    tag: str = hand.get(path).headers["etag"]
    return tag


def draft(author: Hand, text: str, tag: str | None = None) -> httpx.Response:
    return author.post(VERSIONS, {"reason": REASON, "document": text}, tag or etag(author))


# --- versions ---


def test_questions_are_answered_while_a_long_policy_is_read(app: Hand, author: Hand) -> None:
    """On the event loop, reading it would let by the one that came before, or two."""
    long = "".join(f"key-{number}: 1\n" for number in range(20_000))
    answered, tag = 0, etag(author)
    app.post("/v1/chat/completions", CHAT).raise_for_status()  # the policy that holds is in memory
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(draft, author, long, tag)
        while not reading.done():
            app.post("/v1/chat/completions", CHAT).raise_for_status()
            answered += 1
    assert reading.result().status_code == 422
    assert len(reading.result().json()["findings"]) == MAX_FINDINGS
    assert answered > 2


def test_a_new_version_holds_only_once_it_is_activated(
    gateway: RunningGateway, author: Hand, approver: Hand, app: Hand
) -> None:
    drafted = draft(author, text_of(gateway, denied_role="app"))
    assert drafted.status_code == 201
    number = drafted.json()["version"]
    assert drafted.headers["location"] == f"{VERSIONS}/{number}"
    assert app.post("/v1/chat/completions", CHAT).status_code == 200
    activated = approver.post(f"{VERSIONS}/{number}:activate", {"reason": REASON}, drafted.headers["etag"])
    assert activated.status_code == 200
    assert app.post("/v1/chat/completions", CHAT).status_code == 403
    shown = author.get(POLICY)
    assert shown.json()["version"] == number
    assert shown.json()["effective_digest"] == activated.json()["effective_digest"]
    assert shown.headers["etag"] == activated.headers["etag"]


def test_what_decides_is_what_was_activated(gateway: RunningGateway, author: Hand, approver: Hand, app: Hand) -> None:
    drafted = draft(author, text_of(gateway))
    activated = approver.post(f"{drafted.headers['location']}:activate", {"reason": REASON}, drafted.headers["etag"])
    answer = app.post("/v1/chat/completions", CHAT)
    assert answer.headers["probity-policy"] == activated.json()["effective_digest"]
    assert leaves(gateway, type="policy.activated")[-1].body["effective"] == answer.headers["probity-policy"]


def test_a_version_may_be_yaml_or_json(gateway: RunningGateway, author: Hand) -> None:
    text = text_of(gateway)
    as_json = orjson.loads(parse_policy(text).canonical())
    first = draft(author, text).json()["version"]
    second = draft(author, as_json).json()["version"]
    one, two = (author.get(f"{VERSIONS}/{number}").json() for number in (first, second))
    assert one["document"] == two["document"] == as_json
    assert one["digest"] == two["digest"] == "sha256:" + hashlib.sha256(parse_policy(text).canonical()).hexdigest()


def test_versions_are_listed_in_slices(gateway: RunningGateway, author: Hand) -> None:
    for number in range(4):
        assert draft(author, text_of(gateway, name=f"name-{number}")).status_code == 201
    whole = author.get(VERSIONS).json()
    assert [version["version"] for version in whole["versions"]] == [1, 2, 3, 4, 5]
    assert whole["active"] == 1
    first = author.get(VERSIONS, limit=2).json()
    rest = author.get(VERSIONS, limit=100, after=first["after"]).json()
    assert first["versions"] + rest["versions"] == whole["versions"]
    assert rest["after"] is None


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda text: text.replace("default: deny", "default: allow"), "default"),
        (lambda text: text.replace(f"tenant: {TENANT}", "tenant: another-tenant"), "tenant"),
        (lambda text: text.replace(f"models_any: [{MODEL}]", "models_any: [no-such]"), "rules[0].when.models_any"),
        (lambda text: text + "\nsurprise: 1\n", "surprise"),
        (lambda text: text + "\nname: twice\n", "line"),
        (lambda text: text.replace("name: test", "name: &a test"), "line"),
        (lambda text: "[1, 2", "line"),
        (lambda text: "just a text", "document"),
    ],
)
def test_a_document_that_is_no_policy_is_refused_with_the_place(
    gateway: RunningGateway, author: Hand, change: Any, path: str
) -> None:
    before = len(leaves(gateway))
    answer = draft(author, change(policy_text(gateway.rooms.engine.model.digest)))
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert any(finding["path"].startswith(path) for finding in answer.json()["findings"])
    assert len(leaves(gateway)) == before
    assert etag(author) == '"2"'


def test_a_tenant_cannot_loosen_the_floor(gateway: RunningGateway, author: Hand, approver: Hand) -> None:
    floor = 'api_version: policy/v1\ntenant: "*"\nname: floor\ndefault: deny\nparams:\n  org: {n: {max: 1}}\n'
    platform = Hand(gateway, "policy_author", "policy_approver", tenant="*", subject="petra@platform.example")
    versions = "/admin/tenants/*/policy/versions"
    drafted = platform.post(versions, {"reason": REASON, "document": floor}, etag(platform, versions))
    assert drafted.status_code == 201
    platform.post(f"{versions}/1:activate", {"reason": REASON}, drafted.headers["etag"]).raise_for_status()
    loose = text_of(gateway) + "\nparams:\n  loose: {n: {max: 2}}\n"
    answer = draft(author, loose)
    assert answer.status_code == 422
    assert answer.json()["findings"][0]["path"] == "params.loose.n.max"
    assert [leaf.type.value for leaf in leaves(gateway, "system")][-2:] == ["policy.drafted", "policy.activated"]


@pytest.mark.parametrize(
    "document",
    [{}, {"name": 10**30}, {"name": 0.5}, {"name": {"a": {"b": [None, True]}}}, [], 7, None, "", "\x00", "{"],
)
def test_what_is_no_document_at_all_is_refused_and_never_an_accident(author: Hand, document: Any) -> None:
    answer = author.post(VERSIONS, {"reason": REASON, "document": document}, etag(author))
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


# --- against what was seen ---


def test_a_change_says_what_was_seen(gateway: RunningGateway, author: Hand, approver: Hand, admin: Hand) -> None:
    before = len(leaves(gateway))
    unseen = [
        author.post(VERSIONS, {"reason": REASON, "document": text_of(gateway)}),
        approver.post(f"{VERSIONS}/1:activate", {"reason": REASON}),
        approver.post(f"{POLICY}:rollback", {"reason": REASON, "to": 1}),
        admin.post(f"/admin/tenants/{TENANT}:suspend", {"reason": REASON}),
        admin.post(f"/admin/tenants/{TENANT}:resume", {"reason": REASON}),
    ]
    assert [answer.status_code for answer in unseen] == [428] * 5
    for tag in ('"999"', '"1"', "*", 'W/"2"', "2", '"', "nonsense"):
        stale = draft(author, text_of(gateway), tag)
        assert stale.status_code == 412, tag
        assert stale.headers["etag"] == '"2"'
    assert len(leaves(gateway)) == before


def test_of_many_at_the_same_moment_one_wins(gateway: RunningGateway, author: Hand) -> None:
    tag = etag(author)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: draft(author, text_of(gateway, name=f"n-{number}"), tag), range(8)))
    assert sorted(answer.status_code for answer in answers) == [201] + [412] * 7
    assert len(author.get(VERSIONS).json()["versions"]) == 2
    assert len(leaves(gateway, type="policy.drafted")) == 1


@pytest.mark.parametrize("reason", [None, "", "   ", "ab", "x" * 1001, 5])
def test_a_change_says_why(gateway: RunningGateway, admin: Hand, reason: Any) -> None:
    path = f"/admin/tenants/{TENANT}"
    answer = admin.post(f"{path}:suspend", {"reason": reason} if reason is not None else {}, etag(admin, path))
    assert answer.status_code == 400
    assert admin.get(path).json()["status"] == "active"


# --- on record ---


def test_each_change_and_its_record_say_the_same(
    gateway: RunningGateway, author: Hand, approver: Hand, admin: Hand
) -> None:
    text = text_of(gateway)
    drafted = draft(author, text)
    approver.post(f"{VERSIONS}/2:activate", {"reason": REASON}, drafted.headers["etag"]).raise_for_status()
    back = approver.post(f"{POLICY}:rollback", {"reason": "it broke", "to": 1}, etag(approver))
    assert (back.status_code, back.json()["version"]) == (200, 3)
    path = f"/admin/tenants/{TENANT}"
    admin.post(f"{path}:suspend", {"reason": "an incident"}, back.headers["etag"]).raise_for_status()

    made, held, returned, stopped = leaves(gateway)[-4:]
    assert (made.type.value, made.body["version"]) == ("policy.drafted", 2)
    assert part(gateway, made, "document") == parse_policy(text).canonical()
    assert (held.type.value, held.body["version"]) == ("policy.activated", 2)
    assert held.body["digest"] == made.body["digest"]
    assert (returned.type.value, returned.body["version"], returned.body["to"]) == ("policy.rolled_back", 3, 1)
    assert part(gateway, returned, "reason") == b"it broke"
    assert (stopped.type.value, stopped.body["change"]) == ("access.changed", "tenant.suspended")
    assert identities(gateway, stopped)["subject"] == admin.subject
    for leaf in (made, held, returned, stopped):
        assert b"test.example" not in leaf.encode()
        assert REASON.encode() not in leaf.encode()


@pytest.mark.parametrize("gateway", [{"audit__append_timeout_s": 0.7}], indirect=True, ids=["impatient"])
def test_without_a_record_there_is_no_change(
    gateway: RunningGateway, author: Hand, approver: Hand, admin: Hand
) -> None:
    drafted = draft(author, text_of(gateway))
    before = len(leaves(gateway))
    with database_locked(gateway):
        answers = [
            draft(author, text_of(gateway), drafted.headers["etag"]),
            approver.post(f"{VERSIONS}/2:activate", {"reason": REASON}, drafted.headers["etag"]),
            admin.post(f"/admin/tenants/{TENANT}:suspend", {"reason": REASON}, drafted.headers["etag"]),
        ]
    assert [answer.status_code for answer in answers] == [503] * 3
    # What was not confirmed may still have been made, once the database answers again: but never without its record.
    admin.get(f"/admin/tenants/{TENANT}").raise_for_status()
    query = text(
        "SELECT (SELECT generation FROM tenant_state WHERE tenant = :tenant),"
        " (SELECT count(*) FROM leaf WHERE log = :log)"
    )
    with gateway.rooms.log.database.reader.connect() as connection:  # at one moment: the last may just be written
        asked = {"tenant": TENANT, "log": gateway.rooms.log.origin(TENANT)}
        generation, count = connection.execute(query, asked).one()
    assert generation - 3 == count - before


def test_rolling_back_to_nothing_is_refused(gateway: RunningGateway, approver: Hand) -> None:
    tag = etag(approver)
    assert approver.post(f"{POLICY}:rollback", {"reason": REASON, "to": 77}, tag).status_code == 404
    assert approver.post(f"{POLICY}:rollback", {"reason": REASON, "to": 0}, tag).status_code == 400
    assert approver.post(f"{VERSIONS}/77:activate", {"reason": REASON}, tag).status_code == 404
    assert etag(approver) == tag


# --- suspension ---


def test_a_suspended_tenant_is_served_again_once_it_is_resumed(gateway: RunningGateway, admin: Hand, app: Hand) -> None:
    path = f"/admin/tenants/{TENANT}"
    suspended = admin.post(f"{path}:suspend", {"reason": "an incident"}, etag(admin, path))
    refused = app.post("/v1/chat/completions", CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "suspended")
    engine = gateway.rooms.engine
    assert isinstance(engine, ScriptedEngine)
    assert len(set(engine.forgotten)) == 1  # what was computed for it is found by nobody any more
    again = admin.post(f"{path}:suspend", {"reason": "an incident"}, suspended.headers["etag"])
    assert (again.status_code, again.json()["title"]) == (409, "conflict")
    resumed = admin.post(f"{path}:resume", {"reason": "it is over"}, suspended.headers["etag"])
    assert resumed.status_code == 200
    assert app.post("/v1/chat/completions", CHAT).status_code == 200
    assert [leaf.body["change"] for leaf in leaves(gateway, type="access.changed")] == [
        "tenant.suspended",
        "tenant.resumed",
    ]


# --- who may ---


@pytest.mark.parametrize(
    ("role", "may"),
    [
        ("app", set()),
        ("auditor", {"read"}),
        ("policy_author", {"read", "draft"}),
        ("policy_approver", {"read", "activate", "rollback"}),
        ("admin", {"read", "activate", "rollback", "suspend"}),
        ("contact-centre", set()),
    ],
)
def test_each_role_may_do_its_own_and_no_more(gateway: RunningGateway, role: str, may: set[str]) -> None:
    hand = Hand(gateway, role, subject=f"{role}@test.example")
    wrong = '"999"'  # so that what is permitted stops at 412
    answers = {
        "read": hand.get(POLICY),
        "draft": draft(hand, text_of(gateway), wrong),
        "activate": hand.post(f"{VERSIONS}/1:activate", {"reason": REASON}, wrong),
        "rollback": hand.post(f"{POLICY}:rollback", {"reason": REASON, "to": 1}, wrong),
        "suspend": hand.post(f"/admin/tenants/{TENANT}:suspend", {"reason": REASON}, wrong),
    }
    assert {name for name, answer in answers.items() if answer.status_code != 403} == may


@pytest.mark.parametrize("tenant", ["other-tenant", "*", "system", "No-Tenant", "x" * 64])
def test_nobody_of_one_tenant_touches_another(gateway: RunningGateway, tenant: str) -> None:
    hand = Hand(gateway, "policy_author", "policy_approver", "admin")
    path = f"/admin/tenants/{tenant}"
    answers = [
        hand.get(path),
        hand.get(f"{path}/policy"),
        hand.get(f"{path}/policy/versions"),
        hand.post(f"{path}/policy/versions", {"reason": REASON, "document": text_of(gateway)}, '"0"'),
        hand.post(f"{path}/policy/versions/1:activate", {"reason": REASON}, '"0"'),
        hand.post(f"{path}/policy:rollback", {"reason": REASON, "to": 1}, '"0"'),
        hand.post(f"{path}:suspend", {"reason": REASON}, '"0"'),
    ]
    assert {answer.status_code for answer in answers} <= {403, 404}
