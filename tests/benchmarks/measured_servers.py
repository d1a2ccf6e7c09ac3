"""The two servers that bench_gateway compares, each a process of its own with the same engine and HTTP layer.

    python -m tests.benchmarks.measured_servers governed --data DIR --port N --engine demo

`governed` is the real gateway with everything on: credential, policy with guardrails on input and output, durable log.
`bare` has nothing of that: parse, generate, render. `--fsync-ms` makes every commit of the log as slow as on a disk
whose fsync takes so long, such as one of a data centre.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import uvicorn
from fastapi import FastAPI, Request
from sqlalchemy import Engine as DatabaseEngine
from sqlalchemy import event
from starlette.responses import Response

from engine.request import Engine, GenerationRequest, SamplingParams
from gateway.admission import parse_json
from gateway.answer import Outbox, Piece, Usage
from gateway.app import create_app, load_model, server
from gateway.bounded_http import bounded_http
from gateway.rendering.chat import ChatRenderer
from gateway.rendering.renderer import Envelope
from gateway.schemas.inference import ChatRequest
from gateway.settings import load_settings
from gateway.streaming import EventStream, collect
from tests.benchmarks.machine import fsync_s
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import activate_policy, credential, policy_text

GUARDRAILS = """
guardrails:
  pii-in: {detector: pii, stage: input, action: redact, on_error: block}
  secrets-in: {detector: secrets, stage: input, action: block, on_error: block}
  pii-out: {detector: pii, stage: output, action: redact, entities: [card, iban], on_error: block,
            streaming: {mode: window, hold_chars: 96}}
limits:
  wide: {per_subject: {requests_per_minute: 1000000, concurrency: 1000}, per_tenant: {tokens_per_minute: 1000000000}}
"""
OBLIGATIONS = "guardrails: [pii-in, secrets-in, pii-out], limits: wide"
SCRIPTED_ANSWER = "A transfer abroad costs twelve euros and takes two days. " * 8


def make_engine(name: str, data: Path, model: Path | None, runs_in: str) -> Engine:
    if name == "scripted":
        return ScriptedEngine(lambda prompt: SCRIPTED_ANSWER)
    overrides = {"data_dir": str(data), **({"model.path": str(model)} if model is not None else {})}
    overrides["engine.runs_in"] = runs_in
    return load_model(load_settings(None, {}, overrides))


def run_governed(data: Path, port: int, engine: Engine, disk_s: float) -> None:
    overrides = {"data_dir": str(data), "server.port": port, "limits.max_governed": 1024}
    app = create_app(load_settings(None, {}, overrides), engine=engine)
    activate_policy(app, policy_text(engine.model.digest, obligations=OBLIGATIONS, sections=GUARDRAILS))
    if disk_s:
        slow_down(app.state.probity.log.database.writer, data, disk_s)
    (data / "app.jwt").write_text(credential(app, "app"))
    server(app).run_alone()


def slow_down(database: DatabaseEngine, directory: Path, wanted_s: float) -> None:
    """Let every commit sleep for what an fsync of this disk lacks; a sleep is late, and that is counted."""
    own_s = fsync_s(directory)
    late_s = median(_sleeps_s(0.001)) - 0.001
    if own_s + late_s >= wanted_s:
        raise SystemExit(f"an fsync takes {own_s * 1e3:.2f} ms here; give `--fsync-ms` more than that, or leave it out")
    print(f"an fsync takes {own_s * 1e3:.2f} ms here; each commit takes {(wanted_s - own_s) * 1e3:.2f} ms more")
    event.listen(database, "commit", lambda connection: time.sleep(wanted_s - own_s - late_s))


def _sleeps_s(seconds: float) -> Iterator[float]:
    for _ in range(100):
        begun = time.perf_counter()
        time.sleep(seconds)
        yield time.perf_counter() - begun


def run_bare(data: Path, port: int, engine: Engine) -> None:
    data.mkdir(parents=True, exist_ok=True)
    (data / "app.jwt").write_text("none")
    app = create_bare_app(engine)
    gc.collect()
    gc.freeze()  # as the governed one does
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        http=bounded_http(10.0, 60.0, 2_048),  # its timers and its way of writing are the governed one's
        h11_max_incomplete_event_size=65_536,
        log_config=None,
        access_log=False,
    )


def create_bare_app(engine: Engine) -> FastAPI:
    app = FastAPI()
    running: set[asyncio.Task[None]] = set()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = ChatRequest.model_validate(parse_json(await request.body()))
        request_id = secrets.token_hex(16)
        outbox = Outbox(on_abandon=lambda: engine.abort(request_id))
        task = asyncio.create_task(_generate(engine, asked, request_id, outbox))
        running.add(task)
        task.add_done_callback(running.discard)
        envelope = Envelope(request_id, int(time.time()), asked.model, engine.numeric_policy)
        renderer = ChatRenderer(envelope, engine.token_text, include_usage=asked.include_usage, logprobs=False)
        if asked.stream:
            return EventStream(outbox, renderer, 1, {})
        collected = await collect(outbox, 1)
        assert collected is not None
        return Response(renderer.whole(*collected), media_type="application/json")

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ok"}

    return app


async def _generate(engine: Engine, asked: ChatRequest, request_id: str, outbox: Outbox) -> None:
    text = engine.render_chat([{"role": m.role, "content": m.text} for m in asked.messages])
    prompt = tuple(engine.encode(text, chat=True))
    sampling = SamplingParams(
        max_tokens=asked.token_limit or 64,
        seed=0,
        temperature=float(asked.temperature or 0),
        ignore_eos=asked.ignore_eos,
    )
    count = 0
    async for delta in engine.generate(GenerationRequest(request_id, prompt, sampling, b"bare", "bare")):
        count += len(delta.tokens)
        reason = delta.finish_reason.value if delta.finish_reason is not None else None
        outbox.put(Piece(0, delta.text, delta.logprobs, reason))
    outbox.put(Usage(len(prompt), 0, count, receipt=""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("governed", "bare"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", choices=("demo", "scripted"), default="demo")
    parser.add_argument("--model", type=Path, help="a directory, instead of the demonstration model")
    parser.add_argument("--runs-in", choices=("thread", "process"), default="process")
    parser.add_argument("--fsync-ms", type=float, default=0.0, help="as on a slower disk than this one")
    arguments = parser.parse_args()
    engine = make_engine(arguments.engine, arguments.data, arguments.model, arguments.runs_in)
    if arguments.kind == "bare":
        run_bare(arguments.data, arguments.port, engine)
    else:
        run_governed(arguments.data, arguments.port, engine, arguments.fsync_ms / 1000)


if __name__ == "__main__":
    main()
