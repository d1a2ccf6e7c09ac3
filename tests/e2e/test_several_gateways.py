"""Two gateways on one PostgreSQL: what is decided at one holds at the other within a second, streams included."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.postgres import PostgresDatabase, PostgresServer
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL, TENANT, policy_text

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
WITHIN_S = 1.0  # of the change, by default
PATH = f"/admin/tenants/{TENANT}"


async def slow(position: int) -> None:
    await asyncio.sleep(0.02)


@contextmanager
def two_gateways(
    tmp_path: Path, postgres: PostgresServer, **overrides: Any
) -> Iterator[tuple[RunningGateway, RunningGateway, ScriptedEngine]]:
    """Two on one database and one key store, with the same keys, each with a directory of its own."""
    database = postgres.database()
    places: dict[str, Any] = {
        "database__url": database.url,
        "database__keystore_url": postgres.empty_database().admin_url,
        **overrides,
    }
    engine = ScriptedEngine(lambda prompt: "word " * 400, step=slow)
    with running_gateway(tmp_path / "a", ScriptedEngine(), **places) as first:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        with running_gateway(tmp_path / "b", engine, **places) as second:
            yield first, second, engine


def within(holds: Callable[[], bool], what: str, seconds: float = WITHIN_S) -> None:
    """A second is what is promised; the two cores of a busy machine get two more."""
    deadline = time.monotonic() + seconds + 2
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def change(gateway: RunningGateway, path: str, **body: Any) -> httpx.Response:
    admin = Hand(gateway, "admin", "policy_author", tenant="*", subject="ada@platform.example")
    seen = admin.get(PATH)
    return admin.post(path, {"reason": "a test of two", **body}, seen.headers["etag"]).raise_for_status()


def status(hand: Hand, **more: Any) -> int:
    return hand.post("/v1/chat/completions", {**CHAT, "max_tokens": 1, **more}).status_code


def test_a_suspension_at_one_gateway_holds_at_the_other_and_ends_what_it_streams(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    with two_gateways(tmp_path, postgres) as (first, second, engine):
        app = Hand(second, "app")
        assert status(app) == 200
        text: list[str] = []
        streaming = threading.Thread(target=_stream_into, args=(app, text))
        streaming.start()
        within(lambda: len(text) > 2, "the stream did not begin", seconds=20)
        change(first, f"{PATH}:suspend")
        within(lambda: status(app) == 403, "the other gateway still serves")
        streaming.join(10)
        assert not streaming.is_alive()
        assert '"suspended"' in text[-1]
        assert "[DONE]" not in "".join(text)
        within(lambda: bool(engine.forgotten), "what was computed for the tenant can still be found")
        change(first, f"{PATH}:resume")
        within(lambda: status(app) == 200, "the other gateway serves no more")


def _stream_into(app: Hand, text: list[str]) -> None:
    with app.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        text.extend(line for line in response.iter_lines() if line)


def test_an_activation_at_one_gateway_decides_at_the_other(tmp_path: Path, postgres: PostgresServer) -> None:
    with two_gateways(tmp_path, postgres) as (first, second, engine):
        app = Hand(second, "app")
        assert status(app) == 200
        stricter = policy_text(engine.model.digest).replace("roles_any: [app]", "roles_any: [nobody]")
        drafted = change(first, f"{PATH}/policy/versions", document=stricter)
        change(first, f"{PATH}/policy/versions/{drafted.json()['version']}:activate")
        within(lambda: status(app) == 403, "the other gateway decides by what no longer holds")


@pytest.fixture
def locked_states(postgres: PostgresServer) -> Iterator[Callable[[PostgresDatabase], None]]:
    """Hold the table of tenants' states: who reads it hangs, and everything else answers."""
    held = []

    def lock(database: PostgresDatabase) -> None:
        connection = database.admin()
        held.append(connection)
        connection.execute("BEGIN")
        connection.execute("LOCK TABLE tenant_state IN ACCESS EXCLUSIVE MODE")

    yield lock
    for connection in held:
        connection.close()


def test_policies_that_were_not_confirmed_for_too_long_decide_nothing_and_block_nobody(
    tmp_path: Path, postgres: PostgresServer, locked_states: Callable[[PostgresDatabase], None]
) -> None:
    database = postgres.database()
    patience: dict[str, Any] = {"policies__refresh_s": 0.1, "policies__patience_s": 0.5}
    engine = ScriptedEngine()
    with running_gateway(tmp_path, engine, database__url=database.url, **patience) as gateway:
        app, stranger = Hand(gateway, "app"), Hand(gateway, "app", tenant="never-seen")
        assert status(app) == 200
        locked_states(database)
        within(lambda: status(app) == 503, "it decides by what nobody confirms")
        asked = len(engine.prompts)
        refused = app.post("/v1/chat/completions", CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_unavailable")
        assert status(stranger) == 503  # at once, and the event loop did not wait for it
        assert app.http.get("/livez").status_code == 200
        ready = app.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["database"]) == (503, False)
        assert len(engine.prompts) == asked
        with database.admin() as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE mode = 'AccessExclusiveLock'")
        within(lambda: status(app) == 200, "it does not come back with the database", seconds=10)
