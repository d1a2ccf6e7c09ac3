"""The disk fails under the log of a gateway that serves: the process ends, and what anybody saw is on record."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import httpx

from tests.support.gateway import running_gateway
from tests.support.officers import Hand
from tests.support.scripted_engine import ScriptedEngine
from tests.support.server import ServerProcess
from tests.support.streams import Seen, stream_many
from tests.support.tenant import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
FILE_BYTES = 3_900_000  # less than SQLite's log of writes grows to, before it begins anew; more than a few answers take
STREAMS = 8


def test_an_io_error_under_the_log_ends_the_process_by_name_and_nothing_unrecorded_was_answered(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "data")
    server.start()
    server.limit_files(FILE_BYTES)
    seen = asyncio.run(_ask_until_it_ends(server))
    assert server.wait() == 1
    assert _event(server) == "audit_log_dead"
    assert any(one.done for one in seen)
    assert not all(one.done for one in seen)
    server.start()  # the disk was looked at
    bearer = {"authorization": f"Bearer {(server.data / 'auditor.jwt').read_text()}"}
    with httpx.Client(base_url=server.url, headers=bearer, timeout=30, trust_env=False) as auditor:
        for one in seen:
            if one.text:
                _assert_on_record(auditor, one)
    assert server.stop() == 0
    server.verify()


async def _ask_until_it_ends(server: ServerProcess) -> list[Seen]:
    credential = (server.data / "app.jwt").read_text()
    seen = await stream_many(server.url, credential, MODEL, ["question"])  # alone, it ends before the file is full
    while all(one.done for one in seen):
        seen += await stream_many(server.url, credential, MODEL, [f"question{index}" for index in range(STREAMS)])
    return seen


def _event(server: ServerProcess) -> str:
    """Return the last event of ours; the interpreter says nothing when it ends like this."""
    lines = [json.loads(line) for line in server.stderr.read_text().splitlines() if line.startswith("{")]
    (dead,) = [line for line in lines if line["logger"] == "probity.audit"]
    assert (dead["level"], dead["reason"][:15]) == ("critical", "the_disk_failed")
    assert lines[-1] == dead
    return str(dead["event"])


def _assert_on_record(auditor: httpx.Client, seen: Seen) -> None:
    revealed = auditor.post(f"/audit/requests/{seen.request_id}:reveal", json={"reason": "a failed disk"})
    output = revealed.raise_for_status().json()["output"]
    assert (output[0] if output else "").startswith(seen.text)


def test_a_process_whose_log_has_died_does_not_say_that_it_lives(tmp_path: Path) -> None:
    died = threading.Event()
    told: list[str] = []

    def on_log_death(why: str) -> None:
        told.append(why)
        died.set()

    with running_gateway(tmp_path, ScriptedEngine(), on_log_death=on_log_death, audit__lease_s=1) as gateway:
        assert httpx.get(f"{gateway.url}/livez").json() == {"status": "ok"}
        with closing(sqlite3.connect(gateway.rooms.settings.data_dir / "probity.sqlite3", timeout=30)) as connection:
            connection.execute("UPDATE writer SET ended = 1")  # as another gateway would that holds this one for dead
            connection.commit()
        assert died.wait(20)
        assert "fenced" in told[0]
        lives = httpx.get(f"{gateway.url}/livez")
        assert (lives.status_code, lives.json()) == (503, {"status": "dead"})
        assert Hand(gateway, "app").post("/v1/chat/completions", CHAT).status_code == 503
    assert len(told) == 1
