"""kill -9 at any moment: what a client saw is on record, every received request is closed once, the log verifies.

The server is a real process with a real log; its engine is scripted, slow enough that a kill falls into the middle of
streams, journals and closings. Each round kills it, starts it again, and looks.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.postgres import PostgresServer
from tests.support.server import ServerProcess
from tests.support.streams import Seen, stream_many

ROUNDS = 30
STREAMS = 16
CLOSING = {"request.completed", "request.failed", "request.interrupted"}


@pytest.mark.timeout(600)
def test_after_kill_9_under_streams_all_that_was_seen_is_on_record_on_sqlite(tmp_path: Path) -> None:
    _kill_repeatedly(ServerProcess(tmp_path / "data"), rng=random.Random(1))


@pytest.mark.timeout(600)
def test_after_kill_9_under_streams_all_that_was_seen_is_on_record_on_postgresql(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    url = postgres.new_database()
    _kill_repeatedly(ServerProcess(tmp_path / "data", database_url=url), rng=random.Random(2))


def _kill_repeatedly(server: ServerProcess, rng: random.Random) -> None:
    server.start()
    interrupted = 0
    for _ in range(ROUNDS):
        seen = asyncio.run(_stream_and_kill(server, after_s=rng.uniform(0.02, 0.9)))
        server.start()
        interrupted += sum(_assert_on_record(server, one) for one in seen if one.request_id is not None)
        _assert_every_request_is_closed_once(server)
    assert interrupted > ROUNDS, "the kills fell outside the streams: this test proved nothing"
    assert server.stop() == 0
    _assert_log_verifies(server)


async def _stream_and_kill(server: ServerProcess, after_s: float) -> list[Seen]:
    app_token = (server.data / "app.jwt").read_text()
    prompts = [f"question {index}" for index in range(STREAMS)]
    streams = asyncio.create_task(stream_many(server.url, app_token, "test-chat", prompts))
    await asyncio.sleep(after_s)
    await asyncio.to_thread(server.kill)
    return await streams


def _auditor(server: ServerProcess) -> httpx.Client:
    token = (server.data / "auditor.jwt").read_text()
    return httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {token}"}, timeout=30)


def _assert_on_record(server: ServerProcess, seen: Seen) -> bool:
    """Return whether this answer was cut."""
    with _auditor(server) as auditor:
        story = auditor.get(f"/audit/requests/{seen.request_id}").raise_for_status().json()
        revealed = auditor.post(f"/audit/requests/{seen.request_id}:reveal", json={"reason": "kill test"})
    output = revealed.raise_for_status().json()["output"]
    assert output[0].startswith(seen.text), "a client saw bytes that are not on record"
    if seen.done:
        assert (story["status"], output[0]) == ("completed", seen.text)
    return bool(story["status"] == "interrupted")


def _assert_every_request_is_closed_once(server: ServerProcess) -> None:
    with _auditor(server) as auditor:
        now = time.time()
        window = {"from": _iso(now - 3600), "to": _iso(now + 3600), "limit": 500}
        after: str | None = None
        while True:
            page = auditor.get("/audit/requests", params=window | ({"after": after} if after else {}))
            body = page.raise_for_status().json()
            for row in body["requests"]:
                assert row["status"] in {"completed", "interrupted", "failed", "cancelled"}, row["request_id"]
            after = body.get("next")
            if after is None:
                break
        sample = [row["request_id"] for row in body["requests"][:20]]
        for request_id in sample:
            story = auditor.get(f"/audit/requests/{request_id}").raise_for_status().json()
            types = [record["type"] for record in story["records"]]
            assert types[0] == "request.received"
            assert len([kind for kind in types if kind in CLOSING]) == 1


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _assert_log_verifies(server: ServerProcess) -> None:
    url = (server.data / "database-url").read_text()
    command = [sys.executable, "-m", "audit.verify", url, "--trust", str(server.data / "trust.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
