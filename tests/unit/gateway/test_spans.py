"""A request's spans carry the conventional names and figures, under one trace, and nothing else."""

from __future__ import annotations

from pathlib import Path

import httpx
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.settings import TelemetrySettings
from gateway.telemetry import Telemetry
from tests.support.collector import collector
from tests.support.gateway import running_gateway
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL, TENANT


def test_attributes_noted_later_stand_on_the_span_of_their_stage() -> None:
    exporter = InMemorySpanExporter()
    telemetry = Telemetry(TelemetrySettings(sample_ratio=1.0), "m", SimpleSpanProcessor(exporter))
    with telemetry.stage("probity.generate", {"gen_ai.operation.name": "chat"}) as note:
        note({"gen_ai.usage.output_tokens": 3})
    (span,) = exporter.get_finished_spans()
    assert dict(span.attributes or {}) == {"gen_ai.operation.name": "chat", "gen_ai.usage.output_tokens": 3}
    telemetry.close()


def test_a_request_is_one_trace_from_its_decision_to_its_closing_record(tmp_path: Path) -> None:
    overrides = {"telemetry__sample_ratio": 1.0}
    with (
        collector() as traces,
        running_gateway(tmp_path, ScriptedEngine(), telemetry__otlp_endpoint=traces.url, **overrides) as gateway,
    ):
        answer = httpx.post(
            f"{gateway.url}/v1/chat/completions",
            headers={"authorization": f"Bearer {gateway.credential()}"},
            json={"model": MODEL, "messages": [{"role": "user", "content": "hello"}]},
        )
        assert answer.status_code == 200
    sent = b"".join(traces.received)
    for name in ("probity.answer", "probity.decide", "probity.record", "probity.generate", "probity.close"):
        assert name.encode() in sent
    for value in (
        "gen_ai.operation.name",
        "gen_ai.usage.input_tokens",
        "gen_ai.response.finish_reasons",
        MODEL,
        TENANT,
    ):
        assert value.encode() in sent
    assert answer.headers["x-request-id"].encode() in sent
    assert b"hello" not in sent
    assert b"scripted answer" not in sent
