"""A policy's text that was edited in the database, its digest with it, decides nothing: the log names another one."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from audit.verify import main as verify
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL, TENANT, activate_policy

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
FLOOR = 'api_version: policy/v1\ntenant: "*"\nname: floor\ndefault: deny\nrules:\n' + (
    "  - {id: no-interns, effect: deny, when: {roles_any: [intern]}}\n"
)
Edit = Callable[[sqlite3.Connection], None]


def rewrite(tenant: str, old: str, new: str) -> Edit:
    """Edit a stored version as somebody with the database and no scruples would: the digest fits."""

    def edit(connection: sqlite3.Connection) -> None:
        query = "SELECT document FROM policy_version WHERE tenant = ? AND version = 1"
        (text,) = connection.execute(query, (tenant,)).fetchone()
        assert old in text
        edited = text.replace(old, new)
        digest = "sha256:" + hashlib.sha256(edited.encode()).hexdigest()
        connection.execute(
            "UPDATE policy_version SET document = ?, digest = ? WHERE tenant = ?", (edited, digest, tenant)
        )

    return edit


def swap(connection: sqlite3.Connection) -> None:
    """Let a version hold that nobody activated."""
    connection.execute(
        "INSERT INTO policy_version SELECT tenant, 2, document, digest, author, reason, created_at FROM policy_version "
        "WHERE tenant = ?", (TENANT,),
    )  # fmt: skip
    connection.execute("UPDATE tenant_state SET active_version = 2 WHERE tenant = ?", (TENANT,))


EDITS = [
    (
        rewrite(TENANT, '["app"]', '["app","auditor"]'),
        f"version 1 of the policy of `{TENANT}` is not what was activated",
    ),
    (rewrite("*", '["intern"]', '["nobody"]'), "version 1 of the policy of `*` is not what was activated"),
    (swap, f"the policy of `{TENANT}` that holds, version 2, is not the one activated last"),
]


@pytest.mark.parametrize(("edit", "names"), EDITS, ids=["the tenant's", "the floor's", "another version"])
def test_an_edited_policy_is_served_to_nobody_and_verify_names_it(
    tmp_path: Path, edit: Edit, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine()
    database = tmp_path / "probity.sqlite3"
    with running_gateway(tmp_path, engine) as gateway:
        activate_policy(gateway.app, FLOOR)
        app = Hand(gateway, "app")
        assert app.post("/v1/chat/completions", CHAT).status_code == 200
        assert any(verified(tmp_path) == 0 or time.sleep(0.1) for _ in range(100))  # a checkpoint follows soon
        with closing(sqlite3.connect(database, timeout=30)) as connection:
            edit(connection)
            connection.execute("UPDATE tenant_state SET generation = generation + 1")  # as after any change
            connection.commit()
        gateway.rooms.policies.refresh()
        assert_refused(gateway, app, engine)
    capsys.readouterr()
    assert verified(tmp_path) == 1
    assert names in capsys.readouterr().out


def assert_refused(gateway: RunningGateway, app: Hand, engine: ScriptedEngine) -> None:
    asked = len(engine.prompts)
    refused = app.post("/v1/chat/completions", CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_unavailable")
    assert app.get("/v1/models").status_code == 503
    assert len(engine.prompts) == asked


def verified(data: Path) -> int:
    return verify([f"sqlite:///{data}/probity.sqlite3", "--trust", str(data / "trust")])
