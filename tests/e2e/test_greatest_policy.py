"""The most that a policy may say of one request, floor included, has room on record."""

from __future__ import annotations

import json
from pathlib import Path

from policies.document import FLOOR_TENANT, MAX_REASON_BYTES, MAX_VERDICT_BYTES, PolicyDocument, read_document
from policies.guardrails.detectors import DETECTORS
from tests.support.gateway import running_gateway
from tests.support.officers import Hand, leaves
from tests.support.policies import allow, deny, document_value, floor_value
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import TENANT, activate_policy

LONGEST = 64  # characters of a name


def name(kind: str, number: int) -> str:
    return f"{kind}{number}-".ljust(LONGEST, "x")


def guardrails(kind: str) -> dict[str, dict[str, str]]:
    detector = max(DETECTORS, key=lambda one: sum(map(len, DETECTORS[one].entities)))
    entry = {"detector": detector, "stage": "input", "action": "flag"}
    counts = sum(len(entity) + len('"":9999999,') for entity in DETECTORS[detector].entities)
    size = LONGEST + len(detector) + counts + 91
    return {name(kind, number): entry for number in range(MAX_VERDICT_BYTES // size)}


def greatest(engine: ScriptedEngine) -> tuple[PolicyDocument, PolicyDocument]:
    model = {"version": engine.model.digest, "approval": "A-1", "expires": "2099-12-31"}
    count = MAX_REASON_BYTES // (len(json.dumps({"code": "rule", "rule": name("a", 0)}, separators=(",", ":"))) + 1)
    own = guardrails("own")
    allows = [
        allow(name("a", number), with_={"guardrails": list(own) if number == 0 else []}) for number in range(count)
    ]
    never = [deny(name("d", number), name("because", number), roles_any=["doomed"]) for number in range(158)]
    tenant = read_document(
        document_value(tenant=TENANT, models={"chat": model}, rules=[*allows, *never], guardrails=own)
    )
    return read_document(floor_value(tenant=FLOOR_TENANT, rules=never, guardrails=guardrails("floor"))), tenant


def test_the_greatest_policy_answers_and_denies_on_record(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with running_gateway(tmp_path, engine) as gateway:
        for document in greatest(engine):
            activate_policy(gateway.app, document.canonical().decode())
        roles = [f"role{number}".ljust(64, "x") for number in range(30)]
        said = "password = hunter2Xk9q8LmZ, my card is 4111 1111 1111 1111, AKIAIOSFODNN7EXAMPLE"
        body = {"model": "chat", "messages": [{"role": "user", "content": said}]}
        answered = Hand(gateway, "app", *roles).post("/v1/chat/completions", body)
        assert answered.status_code == 200, answered.text
        denied = Hand(gateway, "app", "doomed", *roles).post("/v1/chat/completions", body)
        assert (denied.status_code, denied.json()["error"]["code"]) == (403, "policy_denied")
        largest = max(len(leaf.encode()) for leaf in leaves(gateway))
        assert 50_000 < largest <= 65_535 - 4_096  # and there is something to spare
