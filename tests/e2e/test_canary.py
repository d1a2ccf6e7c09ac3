"""What was said, and by whom, stands in the HTTP answer and nowhere else in plain text.

Canaries are put into everything a caller can send; then every sink of a real process is read byte for byte: the
database file and its write-ahead log, keys and ratchet, the keystore, stderr, metrics, traces and error bodies.
"""

from __future__ import annotations

import asyncio
import base64
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.auth.development import DevelopmentIssuer
from tests.support.collector import Collector, collector
from tests.support.server import ServerProcess
from tests.support.streams import Seen, stream_many
from tests.support.tenant import MODEL, TENANT

PROMPT = "wombat-prompt-5fe1"
OUTPUT = PROMPT[::-1]  # what the engine makes of it
SUBJECT = "wombat-subject@test.example"
METADATA = "wombat-metadata-77"
HOSTILE = "wombat-hostile-9b"
NOT_OURS = {"app.jwt", "auditor.jwt"}  # left there by the test's own server


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}


def credential(data: Path) -> str:
    issuer = DevelopmentIssuer.open(data, time.time)
    return issuer.issue(tenant=TENANT, roles=["app"], subject=SUBJECT)


def exercise(server: ServerProcess, bearer: str) -> list[bytes]:
    """Ask everything that can go well or wrong; return the error bodies, with their headers."""
    errors: list[httpx.Response] = []
    headers = {"authorization": f"Bearer {bearer}", "x-custom": HOSTILE}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30, trust_env=False) as client:
        chat = "/v1/chat/completions"
        more = {"user": METADATA, "metadata": {"note": METADATA}, "stop": [METADATA]}
        for asked in (body(PROMPT, **more), body(PROMPT, n=2, **more)):
            whole = client.post(chat, json=asked).raise_for_status()
            assert OUTPUT in whole.text
        streamed = client.post(chat, json=body(PROMPT, stream=True, logprobs=True, **more)).raise_for_status()
        assert "[DONE]" in streamed.text
        assert client.post("/v1/completions", json={"model": MODEL, "prompt": PROMPT}).status_code == 200
        responded = client.post("/v1/responses", json={"model": MODEL, "input": PROMPT, "instructions": METADATA})
        assert OUTPUT in responded.raise_for_status().text
        vectors = {"model": MODEL, "input": [PROMPT, METADATA]}
        client.post("/v1/embeddings", json=vectors).raise_for_status()
        errors += [
            client.post(chat, json=body(f"explode {PROMPT}")),
            client.post(chat, json=body(f"explode {PROMPT}", stream=True)),
            client.post(chat, json=body(PROMPT * 1000)),
            client.post(chat, json={**body(PROMPT), HOSTILE: HOSTILE}),
            client.post(chat, json={**body(PROMPT), "temperature": HOSTILE}),
            client.post(chat, json={**body(PROMPT), "messages": [{"role": HOSTILE, "content": PROMPT}]}),
            client.post(chat, content=f'{{"model": "{HOSTILE}'.encode(), headers={"content-type": "application/json"}),
            client.post(chat, content=PROMPT.encode(), headers={"content-type": HOSTILE}),
            client.post(
                chat, json={**body(PROMPT), "tools": [{"type": "function", "function": {"name": HOSTILE + " "}}]}
            ),
            client.post("/v1/responses", json={"model": MODEL, "input": PROMPT, "previous_response_id": HOSTILE}),
            client.post("/v1/embeddings", json={"model": MODEL, "input": PROMPT, "dimensions": HOSTILE}),
            client.post(chat, json=body(PROMPT), headers={"probity-purpose": f"{HOSTILE} !"}),
            client.post(f"/v1/{HOSTILE}", json=body(PROMPT)),
            client.get(f"/v1/models/{HOSTILE}"),
            client.get(f"/v1/receipts/{HOSTILE}"),
            client.get("/audit/requests", params={"from": HOSTILE}),
            client.get("/v1/models", headers={"authorization": f"Bearer {HOSTILE}"}),
            client.get("/v1/models", headers={"authorization": f"Basic {HOSTILE}"}),
            httpx.get(f"{server.url}/v1/models?api_key={bearer}&{HOSTILE}"),
        ]
    assert {answer.status_code for answer in errors} == {400, 401, 403, 404, 500}
    return [answer.content + str(answer.headers).encode() for answer in errors]


def sinks(server: ServerProcess, traces: Collector) -> dict[str, bytes]:
    """Return all that the process has left so far, by name."""
    found = {
        str(path.relative_to(server.data)): path.read_bytes()
        for path in server.data.rglob("*")
        if path.is_file() and path.name not in NOT_OURS
    }
    found["stderr"] = server.stderr.read_bytes()
    found["traces"] = b"".join(traces.received)
    return found


def forms(canary: str) -> Iterable[bytes]:
    """A canary as it may stand somewhere: as it is, in hexadecimal, in base64."""
    raw = canary.encode()
    yield from (raw, raw.hex().encode(), raw.upper())
    yield from (base64.b64encode(raw[skip : skip + len(raw) // 3 * 3 - 3]) for skip in range(3))


def assert_nowhere(named: dict[str, bytes], canaries: Iterable[str]) -> None:
    for name, content in named.items():
        for canary in canaries:
            for form in forms(canary):
                assert form not in content, f"{canary} stands in {name}"


@pytest.mark.timeout(120)
def test_no_sink_of_the_process_holds_a_prompt_an_output_an_identity_or_a_credential(tmp_path: Path) -> None:
    with collector() as traces:
        server = ServerProcess(tmp_path / "data", options=["--token-s", "0", "--otlp", traces.url])
        server.start()
        bearer = credential(server.data)
        canaries = [PROMPT, OUTPUT, SUBJECT, METADATA, HOSTILE, bearer, bearer.rpartition(".")[2]]
        error_bodies = exercise(server, bearer)
        metrics = httpx.get(f"{server.url}/metrics").content
        while_running = sinks(server, traces)
        assert server.stop() == 0
        afterwards = sinks(server, traces)
    assert any(name.endswith("-wal") and content for name, content in while_running.items())
    assert b"probity.decide" in afterwards["traces"]
    assert b"generation_failed" in afterwards["stderr"]
    assert b"probity_requests_total" in metrics
    assert_nowhere(while_running, canaries)
    assert_nowhere(afterwards, canaries)
    assert_nowhere({"metrics": metrics}, canaries)
    assert_nowhere({f"error {index}": said for index, said in enumerate(error_bodies)}, canaries)
    _assert_all_of_it_is_on_record(server.data / "probity.sqlite3")


def _assert_all_of_it_is_on_record(database: Path) -> None:
    """The search would prove nothing if nothing had been written."""
    connection = sqlite3.connect(database)
    try:
        counts = dict(connection.execute("SELECT type, count(*) FROM leaf GROUP BY type").fetchall())
        parts = dict(connection.execute("SELECT part, count(*) FROM content GROUP BY part").fetchall())
    finally:
        connection.close()
    assert counts["request.received"] == 8
    assert counts["request.completed"] == 6
    assert counts["request.failed"] == 2
    assert counts["request.denied"] >= 1
    assert parts["output"] == 8


@pytest.mark.timeout(120)
def test_a_process_that_dies_in_the_middle_leaves_no_plain_text_either(tmp_path: Path) -> None:
    with collector() as traces:
        server = ServerProcess(tmp_path / "data", options=["--otlp", traces.url])
        server.start()
        bearer = credential(server.data)
        seen = asyncio.run(_stream_and_kill(server, bearer))
        left = sinks(server, traces)
    assert all(OUTPUT in one.text for one in seen)
    connection = sqlite3.connect(server.data / "probity.sqlite3")
    try:
        assert connection.execute("SELECT count(*) FROM journal").fetchone()[0] > 0
    finally:
        connection.close()
    assert_nowhere(left, [PROMPT, OUTPUT, SUBJECT, bearer])


async def _stream_and_kill(server: ServerProcess, bearer: str) -> list[Seen]:
    seen = [Seen() for _ in range(4)]
    streams = asyncio.create_task(stream_many(server.url, bearer, MODEL, [PROMPT] * len(seen), seen=seen))
    while not all(OUTPUT in one.text for one in seen):
        await asyncio.sleep(0.01)
    await asyncio.to_thread(server.kill)
    return await streams
