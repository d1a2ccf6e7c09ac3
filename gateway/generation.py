"""The governed task: one received request, from its first token to its one closing record.

It belongs to the process, not to the connection. A client that leaves, or reads slowly, cannot lose the record; a
guardrail, a kill switch, an engine or a log that fails ends it by name. Whatever the end, the limits are settled and
exactly one closing record is appended; only then does the caller get the last of the answer.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import orjson

from audit.log import AuditLog
from audit.records import ChoiceEntry, Receipt, Record, TimingEntry, request_completed, request_failed
from audit.writer import AlreadyClosed, LogDead, LogUnavailable
from engine.request import (
    Engine,
    EngineDraining,
    EngineError,
    EngineOverloaded,
    FinishReason,
    GenerationFailed,
    GenerationRequest,
    GenerationStats,
    RequestRefused,
    SamplingParams,
    TokenLogprob,
    choice_seed,
)
from gateway import errors, spans
from gateway.answer import Failure, Outbox, Usage
from gateway.entries import guardrail_entries, limit_entries
from gateway.error_responses import note_failure
from gateway.errors import ApiError
from gateway.grant import Grant
from gateway.release import Release, told
from gateway.schemas.embeddings import EmbeddingsRequest
from gateway.telemetry import Attributes, Telemetry
from policies.guardrails import OutputInspector, Verdict, merged
from policies.limits import LimitLedger
from policies.store import StoreUnavailable

AT_ONCE = 16  # choices, or inputs, of one request that the engine holds
UNSTREAMED_REST_S = 0.1  # between two looks at an answer that leaves whole
CLOSE_ATTEMPTS = 6  # tries to put a closing record on a log that fails; after them, recovery closes it at a restart
CLOSE_BACKOFF_S = 0.25  # doubles with each try


class Suspended(Exception):
    """The tenant was suspended, or a kill switch engaged, while the answer was being generated."""


@dataclass(slots=True)
class _Choice:
    """What the engine generated for one choice, released or not."""

    request: GenerationRequest
    tokens: list[int]
    stats: GenerationStats | None = None


class Generation:
    def __init__(
        self,
        grant: Grant,
        engine: Engine,
        log: AuditLog,
        ledger: LimitLedger,
        telemetry: Telemetry,
        monotonic: Callable[[], float],
        suspended: Callable[[], bool],
        cache_salt: bytes,
        weight: int,
        recorded: float,
        rest_s: Callable[[], float],
    ) -> None:
        question = grant.question
        self._grant = grant
        self._engine = engine
        self._log = log
        self._ledger = ledger
        self._telemetry = telemetry
        self._monotonic = monotonic
        self._suspended = suspended
        self._recorded = recorded
        self._first_token: float | None = None
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._choices = [
            _Choice(_request(grant, index, cache_salt, weight), []) for index in range(question.request.outputs)
        ]
        # A vector is no text that a guardrail could read.
        guardrails = () if isinstance(question.request, EmbeddingsRequest) else grant.obligations.guardrails
        self._inspectors = [OutputInspector(guardrails) for _ in self._choices]
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self.outbox = Outbox(on_abandon=self._abort)
        self._release = Release(
            question.principal.tenant,
            question.request_id,
            self._inspectors,
            self.outbox,
            log.journal,
            monotonic,
            engine.token_text,
            on_halt=self._abort_choice,
            rest_s=rest_s,
        )

    async def run(self) -> None:
        """Generate, release, close. Never raises: whatever happens is in the record and in the outbox."""
        about = spans.granted(self._grant)
        with self._telemetry.stage("probity.generate", about) as note:
            failure = await self._generated_or_failed()
            note(self._figures())
        try:
            with self._telemetry.stage("probity.close"):
                await self._close(failure)
        except Exception as error:  # the caller must not wait for ever; the next start closes it as interrupted
            note_failure("request_not_closed", error)
            self.outbox.put(Failure(errors.internal_error()))
            await self._close_barely()

    async def _generated_or_failed(self) -> ApiError | None:
        """Generate to the end; return what the caller is told if it fails."""
        try:
            await self._generate()
        except Exception as error:
            self._abort()
            return _named(error)
        return None

    def _figures(self) -> Attributes:
        reasons = [self._release.finish_reason(index) or "cancelled" for index in range(len(self._choices))]
        output = sum(len(choice.tokens) for choice in self._choices)
        return spans.generated(self._grant.prompt_tokens, self._cached_tokens(), output, reasons)

    # --- generating ---

    async def _generate(self) -> None:
        """Follow every choice to its end while the pump releases; the first failure of either ends all."""
        # An unstreamed answer leaves whole, after its closing record: there is nothing to journal on the way.
        pumps = [asyncio.ensure_future(self._release.pump())] if self._grant.question.request.stream else []
        if len(self._choices) == 1:
            await self._follow_beside(pumps)
            return
        followers = [asyncio.ensure_future(self._follow_in_turn(index)) for index in range(len(self._choices))]
        try:
            unfinished = set(followers)
            while unfinished:
                done, _ = await asyncio.wait(unfinished.union(pumps), return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                unfinished -= done
        finally:
            for task in (*followers, *pumps):
                task.cancel()
            await asyncio.gather(*followers, *pumps, return_exceptions=True)

    async def _follow_beside(self, pumps: Sequence[asyncio.Future[None]]) -> None:
        """Follow the one choice, in this task: the common case. A pump that fails ends it by ending its generation."""
        for pump in pumps:
            pump.add_done_callback(lambda pump: None if pump.cancelled() else self._abort())
        try:
            await self._follow(0)
        finally:
            for pump in pumps:
                pump.cancel()
            ended = await asyncio.gather(*pumps, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, Exception):
                raise failure

    async def _follow_in_turn(self, index: int) -> None:
        async with self._at_once:
            await self._follow(index)

    async def _follow(self, index: int) -> None:
        choice = self._choices[index]
        rest_s = self._release.resting_s if self._grant.question.request.stream else lambda: UNSTREAMED_REST_S
        async for delta in self._engine.generate(choice.request, rest_s):
            if self._suspended():
                raise Suspended
            if self._first_token is None and delta.tokens:
                self._first_token = self._monotonic()
            choice.tokens.extend(delta.tokens)
            self._prompt_logprobs += delta.prompt_logprobs
            if self.outbox.abandoned:  # it may have left before the engine knew the request
                self._engine.abort(choice.request.request_id)
            text = delta.text if delta.embedding is None else b64encode(delta.embedding).decode()
            self._release.add(index, text, delta.logprobs)
            if delta.finish_reason is not None:
                choice.stats = delta.stats
                cancelled = delta.finish_reason is FinishReason.ABORT
                self._release.finish(index, "cancelled" if cancelled else delta.finish_reason.value)

    def _abort(self) -> None:
        for index in range(len(self._choices)):
            self._abort_choice(index)

    def _abort_choice(self, index: int) -> None:
        self._engine.abort(self._choices[index].request.request_id)

    # --- closing ---

    async def _close(self, failure: ApiError | None) -> None:
        self._observe()
        used = self._grant.prompt_tokens + sum(len(choice.tokens) for choice in self._choices)
        self._ledger.settle(self._grant.question.request_id, used)
        verdicts = merged([inspector.verdicts() for inspector in self._inspectors])  # a leaf has room for one of each
        record = self._completed(used, verdicts) if failure is None else self._failed(failure, verdicts)
        receipt = await self._put_on_record(record)
        if receipt is None:
            return
        if failure is not None:
            self.outbox.put(Failure(failure))
            return
        self._release.send_rest()
        self.outbox.put(
            Usage(
                prompt_tokens=self._grant.prompt_tokens,
                cached_tokens=self._cached_tokens(),
                completion_tokens=sum(len(choice.tokens) for choice in self._choices),
                receipt=str(receipt),
                prompt_logprobs=None if self._grant.sampling.prompt_logprobs is None else self._prompt_logprobs,
            )
        )

    async def _close_barely(self) -> None:
        """Close a request whose record was refused for what it says; the next start closes what fails here too."""
        try:
            await self._put_on_record(self._failed(errors.internal_error(), ()))
        except Exception as error:
            note_failure("request_left_open", error)

    async def _put_on_record(self, record: Record) -> Receipt | None:
        """Return the receipt of the closing record; or None, and the caller is told that there is none.

        A try that was not confirmed in time may be stored all the same: the next one is then told `AlreadyClosed`.
        """
        for attempt in range(CLOSE_ATTEMPTS):
            try:
                return await self._log.append(record)
            except (LogUnavailable, AlreadyClosed) as refused:
                self.outbox.put(Failure(errors.audit_unavailable()))
                if isinstance(refused, LogDead | AlreadyClosed):
                    break
                await asyncio.sleep(CLOSE_BACKOFF_S * 2**attempt)
        return None

    def _observe(self) -> None:
        for index, choice in enumerate(self._choices):
            if choice.stats is not None:
                self._telemetry.engine.observe_sequence(choice.stats, self._release.finish_reason(index) or "cancelled")
        for verdict in (*self._grant.verdicts, *self._verdicts()):
            self._telemetry.gateway.count_guardrail(verdict.detector, verdict.stage.value, verdict.outcome.value)

    def _completed(self, used: int, verdicts: Sequence[Verdict]) -> Record:
        question = self._grant.question
        return request_completed(
            tenant=question.principal.tenant,
            request_id=question.request_id,
            status="cancelled" if self.outbox.abandoned else "completed",
            choices=[self._choice_entry(index) for index in range(len(self._choices))],
            usage={
                "prompt_tokens": self._grant.prompt_tokens,
                "cached_tokens": self._cached_tokens(),
                "completion_tokens": sum(len(choice.tokens) for choice in self._choices),
            },
            guardrails=guardrail_entries(verdicts),
            limits=limit_entries(self._grant.obligations.limits, self._grant.reserved_tokens, used),
            timings=self._timings(),
            output=orjson.dumps(self._release.output()),
            output_tokens=orjson.dumps([choice.tokens for choice in self._choices]),
            logprobs=self._told(),
        )

    def _failed(self, failure: ApiError, verdicts: Sequence[Verdict]) -> Record:
        question = self._grant.question
        return request_failed(
            tenant=question.principal.tenant,
            request_id=question.request_id,
            code=failure.code,
            timings=self._timings(),
            output=orjson.dumps(self._release.output()),
            guardrails=guardrail_entries(verdicts),
            logprobs=self._told(),
        )

    def _told(self) -> bytes | None:
        """What may leave beside the text: the log-probabilities that were asked for, with every token they name."""
        sampling = self._grant.sampling
        if not sampling.logprobs and sampling.prompt_logprobs is None:
            return None
        return orjson.dumps(
            {"choices": self._release.logprobs(), "prompt": [told(one) for one in self._prompt_logprobs]}
        )

    def _choice_entry(self, index: int) -> ChoiceEntry:
        choice = self._choices[index]
        return ChoiceEntry(
            index=index,
            finish_reason=self._release.finish_reason(index) or "cancelled",
            tokens=len(choice.tokens),
            seed=str(choice.request.sampling.seed),
            replay=choice.stats.replay_digest if choice.stats is not None else "",
        )

    def _cached_tokens(self) -> int:
        found = [choice.stats.cached_tokens for choice in self._choices if choice.stats is not None]
        return sum(found) if isinstance(self._grant.question.request, EmbeddingsRequest) else max(found, default=0)

    def _verdicts(self) -> list[Verdict]:
        return [verdict for inspector in self._inspectors for verdict in inspector.verdicts()]

    def _timings(self) -> TimingEntry:
        released = self._release.first_sent

        def since_received(moment: float) -> int:
            return round((moment - self._grant.question.received) * 1_000_000)

        return TimingEntry(
            decided_us=since_received(self._grant.decided),
            recorded_us=since_received(self._recorded),
            first_token_us=since_received(self._first_token) if self._first_token is not None else None,
            first_release_us=since_received(released) if released is not None else None,
            total_us=since_received(self._monotonic()),
        )


def _request(grant: Grant, index: int, cache_salt: bytes, weight: int) -> GenerationRequest:
    """Return what the engine is asked for choice `index`, or for the vector of input `index`."""
    asked = grant.question.request
    pooling = asked.pooling if isinstance(asked, EmbeddingsRequest) else None
    adapter = grant.model.adapter
    return GenerationRequest(
        request_id=f"{grant.question.request_id}/{index}",
        prompt=grant.prompts[0 if pooling is None else index],
        sampling=_sampling(grant.sampling, index),
        cache_salt=cache_salt,
        fairness_key=cache_salt.hex(),
        weight=weight,
        priority=asked.priority,
        pooling=pooling,
        adapter=adapter.name if adapter is not None else None,
    )


def _sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the sampling of choice `index`. The prompt is the same for all; the first one looks at it."""
    if index == 0:
        return sampling
    return replace(sampling, seed=choice_seed(sampling.seed, index), prompt_logprobs=None)


def _named(error: Exception) -> ApiError:
    """Return what the caller is told. The engine's and the log's own errors are told apart; anything else is ours."""
    if isinstance(error, LogUnavailable | StoreUnavailable):
        return errors.audit_unavailable()
    if isinstance(error, Suspended):
        return errors.suspended()
    if isinstance(error, RequestRefused):
        return errors.invalid_request(str(error), param=error.param)
    if isinstance(error, GenerationFailed):
        return errors.invalid_request(str(error))
    if isinstance(error, EngineOverloaded):
        return errors.overloaded()
    if isinstance(error, EngineDraining):
        return errors.draining()
    if isinstance(error, EngineError):
        return errors.engine_unavailable()
    note_failure("generation_failed", error)
    return errors.internal_error()
