"""Telemetry: the names dashboards know, bounded labels, and never a word of what was said."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import error_attributes, gen_ai_attributes
from prometheus_client.parser import text_string_to_metric_families

from engine.request import EngineHealth, GenerationStats
from gateway import semantic_conventions
from gateway.settings import TelemetrySettings
from gateway.telemetry import MAX_LABEL_VALUES, Telemetry

HEALTH = EngineHealth(
    alive=True, last_step_age_s=0.1, running=3, waiting=2, free_blocks=50, cached_blocks=25, used_blocks=25
)
STATS = GenerationStats(
    prompt_tokens=10,
    cached_tokens=4,
    output_tokens=5,
    preemptions=1,
    queued_s=0.01,
    first_token_s=0.1,
    total_s=0.5,
    replay_digest="00",
)
CANARY = "canary-4929-1234"


@dataclass(frozen=True)
class Log:
    alive: bool = True
    queued: int = 7
    disk_low: bool = False


def samples(telemetry: Telemetry, health: EngineHealth = HEALTH) -> dict[str, float]:
    text = telemetry.exposition(health, Log(), governed=4).decode()
    families = text_string_to_metric_families(text)
    return {
        ",".join([sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))]): sample.value
        for family in families
        for sample in family.samples
    }


def test_engine_metrics_have_the_names_of_vllm_after_the_prefix() -> None:
    telemetry = Telemetry(TelemetrySettings(), "demo")
    telemetry.engine.observe_sequence(STATS, "stop")
    found = samples(telemetry)
    model = "model_name=demo"
    assert found[f"probity_num_requests_running,{model}"] == 3
    assert found[f"probity_num_requests_waiting,{model}"] == 2
    assert found[f"probity_kv_cache_usage_perc,{model}"] == 0.25
    assert found[f"probity_prompt_tokens_total,{model}"] == 10
    assert found[f"probity_generation_tokens_total,{model}"] == 5
    assert found[f"probity_prefix_cache_queries_total,{model}"] == 10
    assert found[f"probity_prefix_cache_hits_total,{model}"] == 4
    assert found[f"probity_num_preemptions_total,{model}"] == 1
    assert found[f"probity_time_to_first_token_seconds_sum,{model}"] == pytest.approx(0.1)
    assert found[f"probity_request_time_per_output_token_seconds_sum,{model}"] == pytest.approx(0.1)
    assert found[f"probity_e2e_request_latency_seconds_count,{model}"] == 1
    assert found[f"probity_request_success_total,finished_reason=stop,{model}"] == 1


def test_steps_that_the_engine_gave_up_are_counted_once_however_often_they_are_asked_for() -> None:
    telemetry = Telemetry(TelemetrySettings(), "demo")
    name = "probity_num_interrupted_steps_total,model_name=demo"
    assert samples(telemetry)[name] == 0
    for given_up in (3, 3, 8):
        assert samples(telemetry, replace(HEALTH, interrupted_steps=given_up))[name] == given_up


def test_the_gateway_counts_what_it_did() -> None:
    telemetry = Telemetry(TelemetrySettings(), "demo")
    telemetry.gateway.count_request("chat.completions", 403, "policy_denied")
    telemetry.gateway.count_refusal("expired")
    telemetry.gateway.count_guardrail("pii", "input", "redacted")
    telemetry.gateway.observe_append(0.002)
    found = samples(telemetry)
    assert found["probity_requests_total,action=chat.completions,code=policy_denied,status=403"] == 1
    assert found["probity_credential_refusals_total,reason=expired"] == 1
    assert found["probity_guardrail_outcomes_total,detector=pii,stage=input,verdict=redacted"] == 1
    assert found["probity_audit_append_seconds_count"] == 1
    assert found["probity_requests_governed"] == 4
    assert found["probity_audit_log_queued"] == 7


def test_a_label_has_a_bounded_number_of_values_whatever_is_counted() -> None:
    telemetry = Telemetry(TelemetrySettings(), "demo")
    for number in range(1000):
        telemetry.gateway.count_request(f"action-{number}", 200)
    found = [name for name in samples(telemetry) if name.startswith("probity_requests_total")]
    assert len(found) == MAX_LABEL_VALUES + 1
    assert samples(telemetry)["probity_requests_total,action=other,code=ok,status=200"] == 1000 - MAX_LABEL_VALUES


def test_two_gateways_in_one_process_share_no_metric() -> None:
    first, second = Telemetry(TelemetrySettings(), "a"), Telemetry(TelemetrySettings(), "a")
    first.gateway.count_refusal("expired")
    assert "probity_credential_refusals_total,reason=expired" not in samples(second)


# --- traces ---


def traced(ratio: float = 1.0) -> tuple[Telemetry, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    settings = TelemetrySettings(sample_ratio=ratio, service_name="probity-test")
    return Telemetry(settings, "demo", SimpleSpanProcessor(exporter)), exporter


async def test_stages_become_spans_inside_each_other_across_tasks() -> None:
    telemetry, exporter = traced()

    async def governed() -> None:
        with telemetry.stage("probity.generate"):
            await asyncio.sleep(0)

    with telemetry.stage("chat", {semantic_conventions.REQUEST_MODEL: "bank-chat"}):
        with telemetry.stage("probity.decide"):
            pass
        task = asyncio.create_task(governed())
    await task
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans["chat"]
    assert root.attributes == {"gen_ai.request.model": "bank-chat"}
    assert root.resource.attributes == {"service.name": "probity-test"}
    assert parent_of(spans["probity.decide"]) == parent_of(spans["probity.generate"]) == root.context.span_id
    telemetry.close()


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def test_an_exception_leaves_its_type_and_none_of_its_words() -> None:
    telemetry, exporter = traced()
    with pytest.raises(KeyError), telemetry.stage("probity.decide"):
        raise KeyError(CANARY)
    span = exporter.get_finished_spans()[0]
    assert span.attributes == {"error.type": "KeyError"}
    assert CANARY not in span.to_json()


def test_an_attribute_without_a_known_name_is_refused() -> None:
    telemetry, _ = traced()
    for name in ("gen_ai.prompt", "gen_ai.input.messages", "gen_ai.output.messages", "prompt"):
        with pytest.raises(ValueError, match="no attribute"), telemetry.stage("x", {name: CANARY}):
            pass


def test_nothing_is_traced_without_an_endpoint_or_outside_the_sample() -> None:
    telemetry, exporter = traced(ratio=0.0)
    with telemetry.stage("probity.decide"):
        pass
    assert exporter.get_finished_spans() == ()
    with Telemetry(TelemetrySettings(), "demo").stage("probity.decide"):
        pass


def test_every_stage_is_timed() -> None:
    telemetry = Telemetry(TelemetrySettings(), "demo")
    with telemetry.stage("probity.decide"):
        pass
    assert samples(telemetry)["probity_stage_seconds_count,stage=probity.decide"] == 1


def test_the_copied_names_are_those_of_the_convention() -> None:
    theirs = {
        value
        for module in (gen_ai_attributes, error_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    ours = {name for name in semantic_conventions.KNOWN_ATTRIBUTES if not name.startswith("probity.")}
    assert ours <= theirs
    content = {"gen_ai.prompt", "gen_ai.completion", "gen_ai.input.messages", "gen_ai.output.messages"}
    assert not content & semantic_conventions.KNOWN_ATTRIBUTES
