"""The database goes away, the disk fills, the process is told to end: the engine is asked nothing that is not on
record, nobody is told that it is, and afterwards the log verifies.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text

from audit.verify import main as verify
from engine.config import EngineConfig
from engine.load import load_engine
from gateway.demo import model_directory
from tests.support.audit_log import limit_pages
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.postgres import PostgresServer
from tests.support.scripted_engine import ScriptedEngine
from tests.support.server import ServerProcess
from tests.support.streams import Seen, stream_many
from tests.support.tenant import MODEL

PATIENCE_S = 30
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
UNKNOWN = {**CHAT, "model": "no-such-model"}


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def assert_unavailable(hand: Hand, *bodies: dict[str, Any]) -> None:
    for body in bodies:
        answer = hand.post("/v1/chat/completions", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_unavailable")
        assert "retry-after" in answer.headers
        assert "probity-receipt" not in answer.headers


def assert_comes_back(hand: Hand, engine: ScriptedEngine, asked_before: int) -> None:
    """Nothing reached the engine meanwhile; the first answer after it is on record like any other."""
    assert len(engine.prompts) == asked_before
    until(lambda: hand.post("/v1/chat/completions", CHAT).status_code == 200, "the gateway did not come back")
    assert len(engine.prompts) == asked_before + 1


def assert_verifies(gateway: RunningGateway, url: str | None = None) -> None:
    data = gateway.rooms.settings.data_dir
    database = url or gateway.rooms.settings.database_url
    assert verify([database, "--trust", str(data / "trust"), "--checkpoint", str(data / "ratchet")]) == 0


def test_without_its_database_the_gateway_answers_503_and_comes_back_with_it(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    engine = ScriptedEngine()
    database = postgres.database()
    overrides: dict[str, Any] = {"database__url": database.url, "audit__append_timeout_s": 0.5}
    with running_gateway(tmp_path, engine, **overrides) as gateway:
        app, stranger = Hand(gateway, "app"), Hand(gateway, "app", tenant="never-seen")
        answered = app.post("/v1/chat/completions", CHAT)
        assert answered.status_code == 200
        postgres.kill()
        try:
            assert_unavailable(app, CHAT, {**CHAT, "stream": True}, UNKNOWN)
            assert_unavailable(stranger, CHAT)  # its policy is in no memory yet
            assert stranger.get("/v1/models").status_code == 503
            receipt = app.get(f"/v1/receipts/{answered.headers['x-request-id']}")
            assert (receipt.status_code, receipt.json()["error"]["code"]) == (503, "audit_unavailable")
            ready = app.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]["database"]) == (503, False)
        finally:
            postgres.start()
        assert_comes_back(app, engine, 1)
        assert app.get("/readyz").json()["checks"]["database"] is True
    assert_verifies(gateway, database.reader_url)


def test_a_full_disk_answers_503_and_is_written_to_again_once_there_is_room(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with running_gateway(tmp_path, engine) as gateway:
        app = Hand(gateway, "app")
        assert app.post("/v1/chat/completions", CHAT).status_code == 200
        limit_pages(gateway.rooms.log, 1)  # as many as there are
        large = {**CHAT, "messages": [{"role": "user", "content": "x" * 3000 + " and more" * 40}]}
        until(lambda: app.post("/v1/chat/completions", large).status_code == 503, "the disk did not fill")
        asked = len(engine.prompts)
        assert_unavailable(app, large, {**large, "stream": True}, {**large, "model": "no-such-model"})
        limit_pages(gateway.rooms.log, 1_000_000)
        assert_comes_back(app, engine, asked)
    assert_verifies(gateway)


def test_below_the_low_water_mark_nothing_new_is_taken_and_readiness_says_why(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with running_gateway(tmp_path, engine, audit__low_water_mib=1_048_576) as gateway:
        app = Hand(gateway, "app")
        ready = f"{gateway.url}/readyz"
        until(lambda: not httpx.get(ready).json()["checks"]["disk"], "the disk was not looked at")
        assert httpx.get(ready).status_code == 503
        assert_unavailable(app, CHAT, {**CHAT, "stream": True})
        assert app.post("/v1/chat/completions", UNKNOWN).status_code == 404  # a denial is small, and still recorded
        assert engine.prompts == []
    assert_verifies(gateway)


@pytest.mark.timeout(120)
def test_sigterm_under_streams_lets_each_end_and_closes_the_log(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "data", options=["--token-s", "0.01"])
    server.start()
    seen, status = asyncio.run(_stream_and_stop(server))
    assert status == 0
    assert all(one.done and one.finish_reason == "stop" for one in seen)
    server.verify()
    server.start()  # and it starts again: nothing was left locked
    with httpx.Client(base_url=server.url, headers=_bearer(server, "auditor"), timeout=30) as auditor:
        for one in seen:
            assert auditor.get(f"/audit/requests/{one.request_id}").json()["status"] == "completed"
    assert server.stop() == 0


async def _stream_and_stop(server: ServerProcess) -> tuple[list[Seen], int]:
    credential = (server.data / "app.jwt").read_text()
    seen = [Seen() for _ in range(8)]
    prompts = [f"question{index}" for index in range(len(seen))]
    streams = asyncio.create_task(stream_many(server.url, credential, MODEL, prompts, seen=seen))
    while not all(one.text for one in seen):
        await asyncio.sleep(0.01)
    status = await asyncio.to_thread(server.stop)
    return await streams, status


def _bearer(server: ServerProcess, role: str) -> dict[str, str]:
    return {"authorization": f"Bearer {(server.data / f'{role}.jwt').read_text()}"}


@pytest.mark.parametrize("stream", [True, False])
def test_what_does_not_end_while_draining_is_closed_on_record_before_the_log_is(tmp_path: Path, stream: bool) -> None:
    engine = load_engine(EngineConfig(model=model_directory(), threads=1, compiled=False, kv_cache_mib=16))
    long = {**CHAT, "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 16}  # seconds, on any machine
    with running_gateway(tmp_path, engine, server__drain_timeout_s=0.2) as gateway:
        asking = threading.Thread(target=_ask_until_cut_off, args=(Hand(gateway, "app"), long), daemon=True)
        asking.start()
        until(lambda: engine.health().running >= 1, "the engine was not asked")
    with create_engine(gateway.rooms.settings.database_url).connect() as connection:
        (status,) = connection.execute(text("SELECT status FROM request_index")).scalars()
    assert status == ("cancelled" if stream else "failed")
    assert_verifies(gateway)


def _ask_until_cut_off(hand: Hand, body: dict[str, Any]) -> None:
    with suppress(httpx.TransportError):
        hand.post("/v1/chat/completions", body)
