"""No prompt reaches the model before it is on record. No output leaves before it is on record.

The witness looks from outside, into the database file, at the very moment: when the engine is asked, and when a chunk
is handed to the server.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, event
from starlette.types import ASGIApp

from audit.records import RecordType
from engine.request import GenerationRequest, Rest, TokenDelta, no_rest
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand, database_locked, leaves
from tests.support.scripted_engine import ScriptedEngine
from tests.support.streams import Seen, stream_chat, stream_many
from tests.support.tenant import MODEL, TENANT
from tests.support.witness import Guarded, Witness

PATIENCE_S = 20
PROSE = "Die Überweisung – 1,50 € – kam am 3. Mai an. 🏦 " * 12
FLAG = (
    "guardrails:\n  seen-out: {detector: pii, stage: output, action: flag, entities: [card], on_error: block,"
    " streaming: {mode: window, hold_chars: 96}}\n"
)
REDACT = FLAG.replace("flag", "redact")


class LookingEngine(ScriptedEngine):
    """Looks into the database whenever it is asked, before anything else."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.witness: Witness | None = None
        self.found: list[tuple[str | None, str]] = []  # what was on record, what it was asked

    async def generate(self, request: GenerationRequest, rest_s: Rest = no_rest) -> AsyncGenerator[TokenDelta, None]:
        assert self.witness is not None
        on_record = self.witness.received_prompt(request.request_id.partition("/")[0])
        self.found.append((on_record, self.decode(request.prompt)))
        async with aclosing(super().generate(request, rest_s)) as deltas:
            async for delta in deltas:
                yield delta


class Tap:
    """Holds up an engine's steps from another thread: `let(n)` lets it generate up to `n` tokens."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._upto = 0

    def let(self, tokens: int) -> None:
        with self._condition:
            self._upto = tokens
            self._condition.notify_all()

    async def step(self, position: int) -> None:
        if position >= self._upto:
            await asyncio.to_thread(self._wait, position)

    def _wait(self, position: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: position < self._upto, PATIENCE_S)


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def drip_until_ended(gateway: RunningGateway, tap: Tap, generated: int) -> None:
    """Let the engine go on token by token: it hears of an abort at a step, whenever the server noticed."""
    upto = itertools.count(generated)

    def ended() -> bool:
        tap.let(next(upto))
        return gateway.rooms.pipeline.governed == 0

    until(ended, "the governed task did not end")


def story(gateway: RunningGateway, request_id: str) -> Any:
    return Hand(gateway, "auditor").get(f"/audit/requests/{request_id}").raise_for_status().json()


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}


# --- promise 1 ---


@pytest.mark.parametrize("asked", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
def test_no_prompt_reaches_the_model_before_it_is_on_record(tmp_path: Path, asked: dict[str, Any]) -> None:
    engine = LookingEngine()
    with running_gateway(tmp_path, engine) as gateway:
        engine.witness = Witness(gateway.rooms, TENANT)
        app = Hand(gateway, "app")
        for number in range(5):
            app.post("/v1/chat/completions", body(f"question {number} with ümläut", **asked)).raise_for_status()
        app.post("/v1/completions", {"model": MODEL, "prompt": "plain", **asked}).raise_for_status()
    assert len(engine.found) == 6 * asked.get("n", 1)
    for on_record, prompt in engine.found:
        assert on_record is not None, "the model was asked before the log had it"
        assert on_record == prompt


def test_what_is_on_record_for_the_model_is_the_redacted_prompt_it_was_asked(tmp_path: Path) -> None:
    engine = LookingEngine()
    sections = "guardrails:\n  cards: {detector: pii, stage: input, action: redact, entities: [card], on_error: block}"
    with running_gateway(tmp_path, engine, obligations="guardrails: [cards]", sections=sections) as gateway:
        engine.witness = Witness(gateway.rooms, TENANT)
        Hand(gateway, "app").ask("my card is 4111 1111 1111 1111, thank you")
    ((on_record, prompt),) = engine.found
    assert on_record == prompt
    assert "[CARD]" in prompt
    assert "4111" not in prompt


def test_without_a_log_the_engine_is_never_touched_and_denials_wait_too(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with running_gateway(tmp_path, engine, audit__append_timeout_s=0.3) as gateway:
        app = Hand(gateway, "app")
        assert app.post("/v1/chat/completions", body("before")).status_code == 200
        with database_locked(gateway):
            for asked in (body("while"), body("while", stream=True), body("while", model="no-such-model")):
                answer = app.post("/v1/chat/completions", asked)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_unavailable")
                assert "probity-receipt" not in answer.headers
        assert len(engine.prompts) == 1
        until(lambda: gateway.rooms.log.health().queued == 0, "the log did not come back")
        until(lambda: app.post("/v1/chat/completions", body("after")).status_code == 200, "no answer afterwards")
        assert len(engine.prompts) == 2
        # What was stored although its caller was told otherwise is closed behind it.
        received = {leaf.request for leaf in leaves(gateway, type="request.received")}
        closed = {
            leaf.request for leaf in leaves(gateway) if leaf.type.value in ("request.completed", "request.interrupted")
        }
        assert received == closed


# --- promise 2 ---


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize(
    ("obligations", "sections", "asked"),
    [
        ("", "", {}),
        ("", "", {"logprobs": True, "top_logprobs": 0}),
        ("guardrails: [seen-out]", FLAG, {"logprobs": True}),
        ("guardrails: [seen-out]", REDACT, {}),
        ("", "", {"n": 3, "logprobs": True}),
    ],
    ids=["plain", "logprobs", "flag", "redact", "choices"],
)
def test_no_output_leaves_before_it_is_on_record(
    tmp_path: Path, obligations: str, sections: str, asked: dict[str, Any], chunk: int
) -> None:
    gates: list[Guarded] = []

    def around(app: FastAPI, inner: ASGIApp) -> ASGIApp:
        gates.append(Guarded(app, inner, TENANT))
        return gates[0]

    async def step(position: int) -> None:
        await asyncio.sleep(max(0.002, 0.0005 * chunk))  # uvloop does not wait for less than a millisecond

    engine = TrailingEngine(lambda prompt: PROSE, step=step, chunk=chunk)
    # The witness looks from the gateway's own loop, at every chunk: on a busy machine a commit is confirmed late.
    patient = {"audit__append_timeout_s": 60}
    with running_gateway(
        tmp_path, engine, obligations=obligations, sections=sections, around=around, **patient
    ) as gateway:
        answers = asyncio.run(stream_many(gateway.url, gateway.credential(), MODEL, ["a", "b", "c"], **asked))
        whole = Hand(gateway, "app").post("/v1/chat/completions", body("d", **asked)).json()
    assert not gates[0].breaches, gates[0].breaches[:3]
    assert [(answer.status, answer.error, answer.done) for answer in answers] == [(200, None, True)] * 3
    assert gates[0].chunks > 6
    assert whole["choices"][0]["message"]["content"] == PROSE


def test_what_comes_with_its_end_waits_for_its_closing_record_alone(tmp_path: Path) -> None:
    tap = Tap()
    journaled: list[int] = []  # rows in the journal, at each commit

    def look(connection: Connection) -> None:
        journaled.append(connection.exec_driver_sql("SELECT count(*) FROM journal").scalar_one())
        if journaled[-1]:
            tap.let(1_000)

    def most_journaled(data: Path, engine: ScriptedEngine) -> int:
        with running_gateway(data, engine) as gateway:
            event.listen(gateway.rooms.log.database.writer, "commit", look)
            (answer,) = asyncio.run(stream_many(gateway.url, gateway.credential(), MODEL, ["a"]))
            assert (answer.done, len(answer.text)) == (True, 500)
        most = max(journaled)
        journaled.clear()
        return most

    tap.let(40)
    assert most_journaled(tmp_path / "in parts", ScriptedEngine(lambda prompt: "word " * 100, step=tap.step)) > 0
    assert most_journaled(tmp_path / "at once", ScriptedEngine(lambda prompt: "word " * 100)) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_as_many_guardrails_as_choices_make_no_record_too_large_to_close_with(tmp_path: Path, stream: bool) -> None:
    names = [f"guardrail-of-a-long-name-{number:03}" for number in range(45)]
    says = (
        "{detector: pii, stage: output, action: redact, entities: [card], on_error: block, "
        "streaming: {mode: window, hold_chars: 96}}"
    )
    sections = "guardrails:\n" + "".join(f"  {name}: {says}\n" for name in names)
    engine = ScriptedEngine(lambda prompt: "fine")
    with running_gateway(
        tmp_path, engine, obligations=f"guardrails: [{', '.join(names)}]", sections=sections
    ) as gateway:
        app = Hand(gateway, "app")
        answer = app.post("/v1/chat/completions", body("hello", n=16, stream=stream))
        assert answer.status_code == 200
        (completed,) = leaves(gateway, type="request.completed")
    entries: Any = completed.body["guardrails"]
    assert [entry["id"] for entry in entries] == names
    assert {entry["verdict"] for entry in entries} == {"passed"}


class TrailingEngine(ScriptedEngine):
    """Its text trails its tokens, as the real detokenizer's does: whole characters only, and the last eight wait."""

    async def generate(self, request: GenerationRequest, rest_s: Rest = no_rest) -> AsyncGenerator[TokenDelta, None]:
        output, told = b"", 0
        async with aclosing(super().generate(request, rest_s)) as deltas:
            async for delta in deltas:
                output += bytes(delta.tokens)
                text = output.decode(errors="ignore")
                upto = len(text) if delta.finish_reason is not None else max(told, len(text) - 8)
                piece, told = text[told:upto], upto
                yield TokenDelta(piece, delta.tokens, delta.logprobs, delta.finish_reason, delta.stats)


def test_a_client_that_leaves_in_the_middle_leaves_a_record_of_at_least_what_it_saw(tmp_path: Path) -> None:
    tap = Tap()
    engine = ScriptedEngine(lambda prompt: "word " * 400, step=tap.step)
    with running_gateway(tmp_path, engine) as gateway:
        tap.let(100)
        app = Hand(gateway, "app")
        seen = ""
        with app.http.stream("POST", "/v1/chat/completions", json=body("hello", stream=True)) as response:
            request_id = response.headers["x-request-id"]
            for line in response.iter_lines():
                if line:
                    seen += orjson.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
                if len(seen) >= 50:
                    break
        drip_until_ended(gateway, tap, 100)
        told = story(gateway, request_id)
        assert told["status"] == "cancelled"
        assert Witness(gateway.rooms, TENANT).texts(request_id)[0].startswith(seen)
        assert [record["type"] for record in told["records"]] == ["request.received", "request.completed"]
        assert engine.health().running == 0


def test_a_client_that_leaves_before_the_first_piece_cancels_too(tmp_path: Path) -> None:
    tap = Tap()
    engine = ScriptedEngine(lambda prompt: "word " * 400, step=tap.step)
    with running_gateway(tmp_path, engine) as gateway:
        for stream in (True, False):
            app = Hand(gateway, "app")
            with pytest.raises(httpx.ReadTimeout):
                app.http.post("/v1/chat/completions", json=body("hello", stream=stream), timeout=0.3)
            app.http.close()
        drip_until_ended(gateway, tap, 0)
        completed = leaves(gateway, type="request.completed")
        assert [leaf.body["status"] for leaf in completed] == ["cancelled", "cancelled"]


def test_a_reader_that_does_not_read_holds_up_neither_the_record_nor_the_memory(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(100_000))  # beyond what sockets and buffers take
    engine = ScriptedEngine(lambda prompt: words, context_length=2_000_000, chunk=512)
    with running_gateway(tmp_path, engine) as gateway, socket.create_connection(_address(gateway)) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        asked = orjson.dumps(body("hello", stream=True))
        reader.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: probity\r\nconnection: close\r\n"
            b"content-type: application/json\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n\r\n%s"
            % (gateway.credential().encode(), len(asked), asked)
        )
        until(lambda: len(leaves(gateway, type="request.completed")) == 1, "the record waits for the reader")
        (closed,) = leaves(gateway, type="request.completed")
        assert closed.body["status"] == "completed"
        assert Witness(gateway.rooms, TENANT).texts(closed.request or "")[0] == words
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # it was slow enough
        received = b"".join(iter(lambda: reader.recv(65_536), b""))
    assert received.rstrip().endswith(b"0")  # the last chunk of the transfer
    events = [line for line in received.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")]
    texts = [orjson.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in events]
    assert "".join(texts) == words
    assert b"data: [DONE]" in received


def _address(gateway: RunningGateway) -> tuple[str, int]:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    return host, int(port)


# --- the end of it ---


def test_suspending_a_tenant_halts_what_is_being_generated(tmp_path: Path) -> None:
    tap = Tap()
    engine = ScriptedEngine(lambda prompt: "word " * 400, step=tap.step)
    with running_gateway(tmp_path, engine) as gateway:
        tap.let(40)
        seen = Seen()
        streaming = threading.Thread(target=lambda: asyncio.run(_stream(gateway, seen)))
        streaming.start()
        until(lambda: len(seen.text) >= 40, "nothing was streamed")
        admin = Hand(gateway, "admin", subject="ada@test.example")
        etag = admin.get(f"/admin/tenants/{TENANT}").headers["etag"]
        admin.post(f"/admin/tenants/{TENANT}:suspend", {"reason": "an incident"}, etag).raise_for_status()
        tap.let(10_000)
        streaming.join(PATIENCE_S)
        until(lambda: gateway.rooms.pipeline.governed == 0, "the governed task did not end")
        assert seen.error is not None
        assert seen.error["code"] == "suspended"
        assert not seen.done
        assert len(seen.text) < 60
        told = story(gateway, seen.request_id or "")
        assert told["status"] == "failed"
        assert Witness(gateway.rooms, TENANT).texts(seen.request_id or "")[0].startswith(seen.text)
        assert engine.health().running == 0


async def _stream(gateway: RunningGateway, seen: Seen) -> None:
    headers = {"authorization": f"Bearer {gateway.credential()}"}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=PATIENCE_S) as client:
        await stream_chat(client, MODEL, "hello", seen)


def test_a_log_that_fails_in_the_middle_releases_nothing_more(tmp_path: Path) -> None:
    tap = Tap()
    engine = ScriptedEngine(lambda prompt: "word " * 400, step=tap.step)
    with running_gateway(tmp_path, engine, audit__append_timeout_s=0.3) as gateway:
        tap.let(40)
        seen = Seen()
        streaming = threading.Thread(target=lambda: asyncio.run(_stream(gateway, seen)))
        streaming.start()
        until(lambda: len(seen.text) >= 40, "nothing was streamed")
        with database_locked(gateway):
            at_the_lock = seen.text
            tap.let(10_000)
            streaming.join(PATIENCE_S)
            assert seen.error is not None
            assert seen.error["code"] == "audit_unavailable"
            assert seen.text == at_the_lock
        until(lambda: gateway.rooms.pipeline.governed == 0, "the governed task did not end")
        closing = [
            leaf for leaf in leaves(gateway) if leaf.type in (RecordType.REQUEST_FAILED, RecordType.REQUEST_COMPLETED)
        ]
        assert len(closing) == 1
        assert Witness(gateway.rooms, TENANT).texts(seen.request_id or "")[0].startswith(seen.text)
