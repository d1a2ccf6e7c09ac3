"""kill -9 at any moment: what a client saw is on record, every received request is closed once, the log verifies.

The server is a real process with a real log; its engine is scripted, slow enough that a kill falls into the middle of
streams, journals and closings. Each round kills it, starts it again, and looks as an auditor would.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text

from tests.support.officers import WINDOW
from tests.support.postgres import PostgresServer
from tests.support.server import ServerProcess
from tests.support.streams import Seen, stream_many
from tests.support.tenant import MODEL

ROUNDS = 30
STREAMS = 16
CLOSED_WITHIN_S = 30.0

# How often each request was received, and how often it was closed.
_COUNTS = text(
    "SELECT request_id, sum(CASE WHEN type = 'request.received' THEN 1 ELSE 0 END), "
    "sum(CASE WHEN type IN ('request.completed', 'request.failed', 'request.interrupted') THEN 1 ELSE 0 END) "
    "FROM leaf WHERE type LIKE 'request.%' GROUP BY request_id"
)


@pytest.mark.timeout(600)
def test_after_kill_9_under_streams_all_that_was_seen_is_on_record_on_sqlite(tmp_path: Path) -> None:
    _kill_repeatedly(ServerProcess(tmp_path / "data"), None, random.Random(1))


@pytest.mark.timeout(600)
def test_after_kill_9_under_streams_all_that_was_seen_is_on_record_on_postgresql(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    database = postgres.database()
    _kill_repeatedly(ServerProcess(tmp_path / "data", database_url=database.url), database.admin_url, random.Random(2))


def _kill_repeatedly(server: ServerProcess, admin_url: str | None, rng: random.Random) -> None:
    interrupted = 0
    server.start()
    for _ in range(ROUNDS):
        seen = asyncio.run(_stream_and_kill(server, after_s=rng.uniform(0.02, 0.9)))
        server.start()
        with _auditor(server) as auditor:
            _wait_until_closed(auditor)
            interrupted += sum(_assert_on_record(auditor, one) for one in seen if one.request_id is not None)
    assert interrupted > ROUNDS, "the kills fell outside the streams: this test proved nothing"
    assert server.stop() == 0
    _assert_each_is_closed_once(admin_url or server.database_url)
    server.verify()


async def _stream_and_kill(server: ServerProcess, after_s: float) -> list[Seen]:
    credential = (server.data / "app.jwt").read_text()
    prompts = [f"question{index}" for index in range(STREAMS)]
    streams = asyncio.create_task(stream_many(server.url, credential, MODEL, prompts))
    await asyncio.sleep(after_s)
    await asyncio.to_thread(server.kill)
    return await streams


def _auditor(server: ServerProcess) -> httpx.Client:
    bearer = {"authorization": f"Bearer {(server.data / 'auditor.jwt').read_text()}"}
    return httpx.Client(base_url=server.url, headers=bearer, timeout=30, trust_env=False)


def _wait_until_closed(auditor: httpx.Client) -> None:
    """On PostgreSQL, orphans are closed once the dead writer's lease ran out."""
    deadline = time.monotonic() + CLOSED_WITHIN_S
    while True:
        page = auditor.get("/audit/requests", params={**WINDOW, "status": "received", "limit": 1}).raise_for_status()
        if not page.json()["requests"]:
            return
        assert time.monotonic() < deadline, "requests of a dead process stay open"
        time.sleep(0.1)


def _assert_on_record(auditor: httpx.Client, seen: Seen) -> bool:
    """Return whether this answer was cut."""
    story = auditor.get(f"/audit/requests/{seen.request_id}").raise_for_status().json()
    revealed = auditor.post(f"/audit/requests/{seen.request_id}:reveal", json={"reason": "kill test"})
    output = revealed.raise_for_status().json()["output"]
    on_record = output[0] if output else ""
    assert on_record.startswith(seen.text), "a client saw what is not on record"
    if seen.done:
        assert (story["status"], on_record) == ("completed", seen.text)
    return bool(story["status"] == "interrupted")


def _assert_each_is_closed_once(url: str) -> None:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            counts = connection.execute(_COUNTS).all()
            left = connection.execute(text("SELECT count(*) FROM journal")).scalar_one()
    finally:
        engine.dispose()
    assert len(counts) > ROUNDS
    assert {(received, closed) for _, received, closed in counts} == {(1, 1)}
    assert left == 0
