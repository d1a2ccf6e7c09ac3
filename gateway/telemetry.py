"""What the process tells about itself: metrics for Prometheus, traces for OpenTelemetry.

No prompt, no output, no credential, no name of a person, ever: metrics have labels from bounded sets, and a span takes
only attributes named in semantic_conventions.py. Tenants are no labels: their number is not ours to bound.

Engine metrics are named as in vLLM, after `probity_`, so that dashboards made for it need one prefix. Traces are made
only where an endpoint is set: a span costs 64 µs, a counter 1 µs.

Source: vLLM, production metrics; OpenTelemetry, generative AI conventions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, Protocol, TypeVar

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, Status, StatusCode, Tracer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.request import EngineHealth, GenerationStats
from gateway.semantic_conventions import KNOWN_ATTRIBUTES
from gateway.settings import TelemetrySettings

MAX_LABEL_VALUES = 64  # of one label; more are counted as `other`
MAX_ATTRIBUTE_CHARS = 128

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SHORT_SECONDS = (0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

Metric = TypeVar("Metric", Counter, Histogram)

AttributeValue = str | bool | int | float | Sequence[str]


Attributes = Mapping[str, AttributeValue]
Note = Callable[[Attributes], None]


class LogState(Protocol):
    """What is asked of the log's health."""

    @property
    def alive(self) -> bool: ...

    @property
    def queued(self) -> int: ...

    @property
    def disk_low(self) -> bool: ...


class _Labelled(Generic[Metric]):
    """A metric's series by their labels' values. The library looks each one up anew, under a lock, every time."""

    def __init__(self, metric: Metric) -> None:
        self._metric: Metric = metric
        self._series: dict[tuple[str, ...], Metric] = {}

    def __call__(self, *values: str) -> Metric:
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = self._metric.labels(*values)
        return series


class _Bounded:
    """A label's values: as they come while there are few, then `other`."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= MAX_LABEL_VALUES:
            return "other"
        self._seen.add(value)
        return value


class EngineMetrics:
    """The engine, seen from its answers and its health."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"probity_{name}", what, ["model_name"], registry=registry).labels(model)

        def counter(name: str, what: str) -> Counter:
            return Counter(f"probity_{name}", what, ["model_name"], registry=registry).labels(model)

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"probity_{name}", what, ["model_name"], registry=registry, buckets=buckets).labels(model)

        self.running = gauge("num_requests_running", "Sequences in the engine's steps.")
        self.waiting = gauge("num_requests_waiting", "Sequences that wait for a step.")
        self.cache_usage = gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self.alive = gauge("engine_alive", "1 while the engine makes progress.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = counter("num_preemptions", "Sequences preempted.")
        self.interrupted_steps = counter("num_interrupted_steps", "Steps given up for who came meanwhile.")
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean per token after the first.", _SHORT_SECONDS
        )
        self.queue_time = histogram("request_queue_time_seconds", "Waiting for the first step.", _SECONDS)
        self.latency = histogram("e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self.request_prompt = histogram("request_prompt_tokens", "Prompt length in tokens.", _TOKENS)
        self.request_output = histogram("request_generation_tokens", "Output length in tokens.", _TOKENS)
        ended = ["model_name", "finished_reason"]
        self._success = _Labelled(
            Counter("probity_request_success", "Sequences ended, by reason.", ended, registry=registry)
        )
        self._model = model
        self._interrupted_steps = 0  # counted already

    def observe_health(self, health: EngineHealth) -> None:
        blocks = health.free_blocks + health.cached_blocks + health.used_blocks
        self.running.set(health.running)
        self.waiting.set(health.waiting)
        self.cache_usage.set(health.used_blocks / blocks if blocks else 0)
        self.alive.set(health.alive)
        self.interrupted_steps.inc(health.interrupted_steps - self._interrupted_steps)
        self._interrupted_steps = health.interrupted_steps

    def observe_sequence(self, stats: GenerationStats, finish_reason: str) -> None:
        self._success(self._model, finish_reason).inc()
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.generation_tokens.inc(stats.output_tokens)
        self.prefix_queries.inc(stats.prompt_tokens)
        self.prefix_hits.inc(stats.cached_tokens)
        self.preemptions.inc(stats.preemptions)
        self.first_token.observe(stats.first_token_s)
        self.queue_time.observe(stats.queued_s)
        self.latency.observe(stats.total_s)
        self.request_prompt.observe(stats.prompt_tokens)
        self.request_output.observe(stats.output_tokens)
        if stats.output_tokens > 1:
            self.per_token.observe((stats.total_s - stats.first_token_s) / (stats.output_tokens - 1))


class GatewayMetrics:
    """What the gateway did with what it was asked."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, what: str, *labels: str) -> _Labelled[Counter]:
            return _Labelled(Counter(f"probity_{name}", what, labels, registry=registry))

        self._requests = counter("requests", "Requests answered.", "action", "status", "code")
        self._refusals = counter("credential_refusals", "Credentials refused, by reason.", "reason")
        self._guardrails = counter("guardrail_outcomes", "Guardrails run.", "detector", "stage", "verdict")
        self._append = Histogram(
            "probity_audit_append_seconds", "Append to durable.", registry=registry, buckets=_SHORT_SECONDS
        )
        self._stages = _Labelled(
            Histogram(
                "probity_stage_seconds", "Stages of a request.", ["stage"], registry=registry, buckets=_SHORT_SECONDS
            )
        )
        self._governed = Gauge("probity_requests_governed", "Requests received and not yet closed.", registry=registry)
        self._log_alive = Gauge("probity_audit_log_alive", "1 while the log takes records.", registry=registry)
        self._log_queued = Gauge("probity_audit_log_queued", "Records that wait to be durable.", registry=registry)
        self._disk_low = Gauge("probity_audit_disk_low", "1 when the disk is below its low water.", registry=registry)
        self._actions, self._codes, self._detectors, self._stage_names = (_Bounded() for _ in range(4))

    def count_request(self, action: str, status: int, code: str = "ok") -> None:
        """`code` is an error's code of contract.md, or `ok`."""
        self._requests(self._actions(action), str(status), self._codes(code)).inc()

    def count_refusal(self, reason: str) -> None:
        self._refusals(reason).inc()

    def count_guardrail(self, detector: str, stage: str, verdict: str) -> None:
        self._guardrails(self._detectors(detector), stage, verdict).inc()

    def observe_append(self, seconds: float) -> None:
        self._append.observe(seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        self._stages(self._stage_names(stage)).observe(seconds)

    def observe_state(self, log: LogState, governed: int) -> None:
        self._governed.set(governed)
        self._log_alive.set(log.alive)
        self._log_queued.set(log.queued)
        self._disk_low.set(log.disk_low)


class Telemetry:
    """One per process. `close()` sends what is left."""

    def __init__(
        self,
        settings: TelemetrySettings,
        model: str,  # as operators call it; the one value of `model_name`
        processor: SpanProcessor | None = None,  # where spans go; without one, to the endpoint of the settings, if any
    ) -> None:
        self._registry = CollectorRegistry()
        self.engine = EngineMetrics(self._registry, model)
        self.gateway = GatewayMetrics(self._registry)
        if processor is None and settings.otlp_endpoint is not None:
            processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=_traces_address(settings.otlp_endpoint)))
        self._provider = _provider(settings, processor) if processor is not None else None
        self._tracer: Tracer | None = self._provider.get_tracer("probity") if self._provider is not None else None

    def stage(self, name: str, attributes: Attributes | None = None) -> AbstractContextManager[Note]:
        """Time a stage of a request, and make it a span where traces are on; yields what notes more attributes on it.

        `name` is a constant of the code. An exception leaves its type on the span and nothing else of itself.

        Raises: ValueError: an attribute that semantic_conventions.py does not know.
        """
        _check_known(attributes or {})
        if self._tracer is None:
            return _Timed(self.gateway, name)
        return self._span(self._tracer, name, attributes or {})

    @contextmanager
    def _span(self, tracer: Tracer, name: str, attributes: Attributes) -> Iterator[Note]:
        with (
            _Timed(self.gateway, name),
            tracer.start_as_current_span(
                name, attributes=dict(attributes), record_exception=False, set_status_on_exception=False
            ) as span,
        ):

            def note(more: Attributes) -> None:
                _check_known(more)
                span.set_attributes(more)

            try:
                yield note
            except BaseException as error:
                _mark_failed(span, error)
                raise

    def exposition(self, engine: EngineHealth, log: LogState, governed: int) -> bytes:
        """Return all metrics in Prometheus's text format, version 0.0.4."""
        self.engine.observe_health(engine)
        self.gateway.observe_state(log, governed)
        return generate_latest(self._registry)

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()


class _Timed:
    """A stage without a span: a request has five, and a generator for each would cost more than all they measure."""

    __slots__ = ("_metrics", "_name", "_start")

    def __init__(self, metrics: GatewayMetrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self._start = 0.0

    def __enter__(self) -> Note:
        self._start = time.perf_counter()
        return _check_known

    def __exit__(self, *_: object) -> None:
        self._metrics.observe_stage(self._name, time.perf_counter() - self._start)


def _check_known(attributes: Attributes) -> None:
    """Raise ValueError for a name that semantic_conventions.py does not know: it may carry what must not be seen."""
    if not KNOWN_ATTRIBUTES.issuperset(attributes):
        unknown = attributes.keys() - KNOWN_ATTRIBUTES
        raise ValueError(f"no attribute is called {', '.join(sorted(unknown))}")


def _mark_failed(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR))


def _traces_address(endpoint: str) -> str:
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"


def _provider(settings: TelemetrySettings, processor: SpanProcessor) -> TracerProvider:
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        # Made directly: the environment could otherwise add anything to it.
        resource=Resource({"service.name": settings.service_name}),
        span_limits=SpanLimits(max_span_attributes=32, max_events=0, max_attribute_length=MAX_ATTRIBUTE_CHARS),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(processor)
    return provider
