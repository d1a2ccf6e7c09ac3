"""The engine process dies under streams: what was seen is on record, each request is closed, the gateway lives."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text

from audit.verify import main as verify
from engine.config import EngineConfig
from engine.engine_process import start_engine
from gateway.demo import model_directory
from tests.support.children import children
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.streams import Seen, stream_many
from tests.support.tenant import MODEL, TENANT
from tests.support.witness import Witness

STREAMS = 16
PATIENCE_S = 30
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
STRUCTURES: tuple[dict[str, object], ...] = ({}, {"response_format": {"type": "json_object"}})


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_killed_under_streams_fails_them_on_record_and_nothing_else(tmp_path: Path, seed: int) -> None:
    before = children()
    engine = start_engine(EngineConfig(model=model_directory(), threads=1, compiled=False, kv_cache_mib=64))
    (pid,) = children() - before
    with running_gateway(tmp_path, engine) as gateway:
        seen = asyncio.run(_stream_and_kill(gateway, pid, random.Random(seed)))
        ready = httpx.get(f"{gateway.url}/readyz")
        refused = [Hand(gateway, "app").post("/v1/chat/completions", QUESTION | one) for one in STRUCTURES]
        witness = Witness(gateway.rooms, TENANT)
        for one in seen:
            assert one.request_id is not None
            on_record, _ = witness.on_record(one.request_id)
            assert on_record.get(0, "").startswith(one.text)
    assert any(one.text for one in seen)
    assert (ready.status_code, ready.json()["checks"]["engine"]) == (503, False)
    assert [(one.status_code, one.json()["error"]["code"]) for one in refused] == [(503, "engine_unavailable")] * 2
    assert all("probity-receipt" in one.headers for one in refused)
    with create_engine(gateway.rooms.settings.database_url).connect() as connection:
        statuses = list(connection.execute(text("SELECT status FROM request_index")).scalars())
    assert len(statuses) == STREAMS + len(refused)
    assert set(statuses) == {"failed"}
    data = gateway.rooms.settings.data_dir
    assert verify([gateway.rooms.settings.database_url, "--trust", str(data / "trust")]) == 0


async def _stream_and_kill(gateway: RunningGateway, pid: int, rng: random.Random) -> list[Seen]:
    seen = [Seen() for _ in range(STREAMS)]
    prompts = [f"What does account number {n} cost?" for n in range(STREAMS)]
    streams = asyncio.create_task(
        stream_many(gateway.url, gateway.credential("app"), MODEL, prompts, seen=seen, max_tokens=900, ignore_eos=True)
    )
    await _until(lambda: all(one.status == 200 for one in seen))
    await asyncio.sleep(rng.uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    return await streams


async def _until(holds: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_S * 100):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("what was waited for never happened")
