"""The story of a request, in the order it happens.

    decide ─▶ on record (promise 1) ─▶ generate ─▶ inspect ─▶ on record (promise 2) ─▶ release ─▶ close
    └────────── this file ──────────┘  └─────────────── generation.py, release.py ───────────────┘

`answer` decides, puts `request.received` on record and starts a governed task (generation.py), which owns the
generation to its end, whatever the client does. A refusal is on record too, as `request.denied`, and carries its
receipt; one that comes before a policy is asked is put on record by refusals.py, which says what is not. Everything
that may refuse happens before `answer` returns; what fails later arrives in the outbox.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import TypeVar

from audit.content import Random
from audit.log import AuditLog
from audit.records import Json, ModelEntry, Record, TimingEntry, request_completed, request_denied, request_received
from audit.writer import LogUnavailable
from engine.dialect import Thinking
from engine.request import MAX_SEED, Engine, EngineDead, RequestRefused, SamplingParams, Structure
from gateway import errors, spans
from gateway.answer import Outbox
from gateway.bounded_reads import BoundedReads
from gateway.entries import (
    decision_entry,
    guardrail_entries,
    limit_entries,
    pooling_body,
    principal_entry,
    sampling_body,
)
from gateway.errors import ApiError
from gateway.generation import Generation
from gateway.grant import Grant, Question
from gateway.message import structure_of
from gateway.refusals import NO_POLICY, UNKNOWN_ALIAS
from gateway.release import Pace
from gateway.schemas.bodies import InferenceRequest
from gateway.schemas.embeddings import EmbeddingsRequest
from gateway.schemas.inference import ChatRequest, CompletionRequest, TextRequest
from gateway.standings import Standings
from gateway.telemetry import Telemetry
from policies.decision import Decision, DeniedBy, GuardrailSpec, Obligations, Reason
from policies.document import EffectivePolicy
from policies.evaluate import evaluate
from policies.guardrails import InputInspection, Verdict, inspect_input, merged
from policies.limits import Holder, LimitLedger, LimitRefusal
from policies.request import AccessRequest, RequestedParams
from policies.store import Standing, StoreUnavailable

EXPLAIN = "policy.explain"
INSPECTED_AT_ONCE = 4_096  # characters; a longer prompt is rendered, inspected and counted beside the event loop
ENTERING_POLL_S = 0.01  # while draining
SALTS = 1_024  # of tenants, that are kept; another is worked out again


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Clock:
    now: Callable[[], datetime]  # UTC
    monotonic: Callable[[], float]  # seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """What the route renders. The outbox fills as pieces are on record."""

    receipt: str  # of request.received
    policy: str  # digest of the policy that decided
    model: str  # digest of the model version
    fingerprint: str  # digest of the numeric policy
    created: int  # Unix seconds
    thinking: Thinking  # whether what the model says may begin with thoughts
    outbox: Outbox


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would be decided on a question, and was put on record instead of an answer."""

    receipt: str
    decision: Decision
    verdicts: tuple[Verdict, ...]  # of the input guardrails
    prompt_tokens: int | None  # None where it was denied
    refusal: ApiError | None = None  # what the caller of the endpoint would be told


class Denied(Exception):
    """A refusal that goes on record. `error` is what the caller gets."""

    def __init__(self, error: ApiError, decision: Decision, verdicts: tuple[Verdict, ...] = ()) -> None:
        super().__init__(error.code)
        self.error = error
        self.decision = decision
        self.verdicts = verdicts


class Pipeline:
    """One per process; lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        standings: Standings,
        ledger: LimitLedger,
        log: AuditLog,
        telemetry: Telemetry,
        clock: Clock,
        random: Random,
        *,
        weight: Callable[[str], int],
        pace: Pace,
        max_governed: int,
        max_of_tenant: int | None,
    ) -> None:
        """`weight`: turns of a tenant among others; `max_of_tenant`: None is three quarters of `max_governed`."""
        self._engine = engine
        self._loaded = frozenset(engine.versions)
        self._standings = standings
        self._ledger = ledger
        self._log = log
        self._telemetry = telemetry
        self._clock = clock
        self._random = random
        self._weight = weight
        self._pace = pace
        self._max_governed = max_governed
        self._max_of_tenant = max_of_tenant or -(-3 * max_governed // 4)
        self._of_tenant: Counter[str] = Counter()  # entering and governed
        self._inspections = BoundedReads(at_once=1, waiting=max_governed)
        self._governed: set[asyncio.Task[None]] = set()
        self._entering = 0  # questions that wait for the log; they will be governed, or are being denied
        self._draining = False
        # Cached blocks live and die with this process, and so does the key that keeps tenants apart among them.
        salt_key = random(32)
        self._salt = lru_cache(SALTS)(lambda tenant: hmac.digest(salt_key, tenant.encode(), "sha256"))

    async def answer(self, question: Question) -> Answer:
        """Return an answer whose prompt is on record.

        Raises: ApiError, one row of contract.md's table; a refusal by policy carries its receipt.
        """
        about = spans.asked(question.action, question.request_id, question.principal.tenant)
        try:
            with self._telemetry.stage("probity.answer", about):
                answer = await self._answer(question)
                await asyncio.sleep(0)  # the governed task goes first: the engine has the prompt while we go on
        except ApiError as error:
            self._telemetry.gateway.count_request(question.action, error.status, error.code)
            raise
        self._telemetry.gateway.count_request(question.action, 200)
        return answer

    async def _answer(self, question: Question) -> Answer:
        return await self._admitted(question, self._enter)

    async def _admitted(self, question: Question, enter: Callable[[Question], Awaitable[T]]) -> T:
        """Let a question in, if there is room; what fails leaves again."""
        if self._draining:
            raise errors.draining()
        tenant = question.principal.tenant
        full = len(self._governed) + self._entering >= self._max_governed
        if full or self._of_tenant[tenant] >= self._max_of_tenant:
            raise errors.overloaded()
        self._entering += 1
        self._of_tenant[tenant] += 1
        try:
            return await enter(question)
        except BaseException:
            self._leave(tenant)
            raise
        finally:
            self._entering -= 1

    def _leave(self, tenant: str) -> None:
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]

    async def explain(self, question: Question) -> Explanation:
        """Decide as for an answer, and generate nothing. What is asked is on record, like any request; the question
        counts as one, with the tokens of its prompt.

        Raises: ApiError: what refuses before a policy is asked, or the log.
        """
        try:
            explained = await self._admitted(question, self._explain)
        except ApiError as error:
            self._telemetry.gateway.count_request(EXPLAIN, error.status, error.code)
            raise
        self._leave(question.principal.tenant)
        self._telemetry.gateway.count_request(EXPLAIN, 200)
        return explained

    async def _explain(self, question: Question) -> Explanation:
        asked = replace(question, action=EXPLAIN)  # as it goes on record; decided on is what it is about
        standing = await self._standing(question.principal.tenant)
        try:
            grant = await self._decide(question, standing)
            self._reserve(grant)
        except Denied as denied:
            error = await self._put_denial_on_record(asked, denied, standing.policy)
            if "probity-receipt" not in error.headers:
                raise error from None
            return Explanation(error.headers["probity-receipt"], denied.decision, denied.verdicts, None, error)
        grant = replace(grant, question=asked)
        self._ledger.settle(question.request_id, grant.prompt_tokens)
        try:
            await self._log.append(self._received(grant))
            receipt = await self._log.append(self._explained(grant))
        except LogUnavailable:
            raise errors.audit_unavailable() from None
        return Explanation(str(receipt), grant.decision, grant.verdicts, grant.prompt_tokens)

    def _explained(self, grant: Grant) -> Record:
        def since_received(moment: float) -> int:
            return round((moment - grant.question.received) * 1_000_000)

        decided, now = since_received(grant.decided), since_received(self._clock.monotonic())
        return request_completed(
            tenant=grant.question.principal.tenant,
            request_id=grant.question.request_id,
            status="completed",
            choices=[],
            usage={"prompt_tokens": grant.prompt_tokens, "cached_tokens": 0, "completion_tokens": 0},
            guardrails=[],
            limits=limit_entries(grant.obligations.limits, grant.reserved_tokens, grant.prompt_tokens),
            timings=TimingEntry(decided, now, None, None, now),
            output=b"[]",
            output_tokens=b"[]",
        )

    async def _enter(self, question: Question) -> Answer:
        """Decide, put on record, start the governed task."""
        standing = await self._standing(question.principal.tenant)
        try:
            with self._telemetry.stage("probity.decide"):
                grant = await self._decide(question, standing)
                self._reserve(grant)
        except Denied as denied:
            raise await self._put_denial_on_record(question, denied, standing.policy) from None
        try:
            appending = self._clock.monotonic()
            with self._telemetry.stage("probity.record"):
                receipt = await self._log.append(self._received(grant))  # promise 1: the engine knows nothing yet
            self._telemetry.gateway.observe_append(self._clock.monotonic() - appending)
        except BaseException as error:
            self._ledger.settle(question.request_id, 0)
            if isinstance(error, LogUnavailable):
                raise errors.audit_unavailable() from None
            raise
        outbox = self._govern(grant)
        return Answer(
            receipt=str(receipt),
            policy=grant.decision.policy,
            model=grant.model.digest,
            fingerprint=self._engine.numeric_policy,
            created=int(self._clock.now().timestamp()),
            thinking=self._engine.dialect.thinking(grant.rendered[0]),
            outbox=outbox,
        )

    # --- deciding ---

    async def _standing(self, tenant: str) -> Standing:
        """Return what holds for the whole request. Raises: ApiError (503)."""
        try:
            return await self._standings.of(tenant)
        except StoreUnavailable:  # the same database: a denial could not be put on record either
            raise errors.audit_unavailable() from None

    async def _decide(self, question: Question, standing: Standing) -> Grant:
        """Return the grant, in the order of policy.md: status, rules, model, parameters, guardrails, context."""
        policy = standing.policy
        if policy is None:
            error = errors.policy_denied("no policy is active for this tenant; an administrator activates one")
            raise Denied(error, Decision.deny(DeniedBy.RULE, NO_POLICY, Reason("no_policy")))
        if standing.suspended:
            raise Denied(errors.suspended(), Decision.deny(DeniedBy.STATUS, policy.digest, Reason("suspended")))
        decision = evaluate(self._access_request(question), policy, self._loaded)
        obligations = decision.obligations
        if obligations is None:
            raise Denied(_denial(decision), decision)
        rendered, verdicts = await self._inspect(question, decision, obligations)
        long = len(question.body) > INSPECTED_AT_ONCE
        counting = (question.request, rendered, decision, obligations, verdicts)
        prompts = await self._inspections.run(self._count, *counting) if long else self._count(*counting)
        sampling = await self._sampling(question.request, rendered, prompts, decision, obligations, verdicts)
        return Grant(
            question=question,
            decision=decision,
            obligations=obligations,
            rendered=rendered,
            prompts=prompts,
            sampling=sampling,
            model=self._engine.versions[obligations.model.version],
            verdicts=verdicts,
            decided=self._clock.monotonic(),
        )

    def _access_request(self, question: Question) -> AccessRequest:
        request = question.request
        return AccessRequest(
            principal=question.principal,
            action=question.action,
            model=request.model,
            purpose=question.principal.purpose,
            source=question.source,
            at=self._clock.now(),
            params=RequestedParams(
                max_tokens=request.token_limit,
                temperature=request.temperature,
                top_p=request.top_p,
                n=request.choices,
            ),
        )

    async def _inspect(
        self, question: Question, decision: Decision, obligations: Obligations
    ) -> tuple[tuple[str, ...], tuple[Verdict, ...]]:
        """Return the texts for the model, as the chat template renders them and after the input guardrails."""
        request = question.request
        long = len(question.body) > INSPECTED_AT_ONCE
        try:
            rendered = await self._inspections.run(self._render, request) if long else self._render(request)
        except RequestRefused as refused:
            param = request.prompt_field if refused.param == "messages" else refused.param
            raise Denied(errors.invalid_request(str(refused), param=param), decision) from None
        inspections = [await self._inspection(text, obligations.guardrails) for text in rendered]
        verdicts = merged([inspection.verdicts for inspection in inspections])
        blocked_by = next((one.blocked_by for one in inspections if one.blocked_by is not None), None)
        if blocked_by is not None:
            raise Denied(errors.content_filter(blocked_by), decision, verdicts)
        shown_by = _shows_tokens(request)
        if shown_by is not None and any(guardrail.withholds_output for guardrail in obligations.guardrails):
            message = "log-probabilities would show text that an output guardrail of the policy withholds"
            raise Denied(errors.invalid_request(message, param=shown_by), decision, verdicts)
        return tuple(inspection.text for inspection in inspections), verdicts

    async def _inspection(self, text: str, guardrails: Sequence[GuardrailSpec]) -> InputInspection:
        """Look at a long text beside the event loop, one at a time: made-up text is slow to look at, 0.1 MB/s, and
        everybody else's answers must go on meanwhile."""
        if len(text) <= INSPECTED_AT_ONCE:
            return inspect_input(text, guardrails)
        return await self._inspections.run(inspect_input, text, guardrails)

    def _render(self, request: InferenceRequest) -> list[str]:
        if isinstance(request, EmbeddingsRequest):
            return request.input
        if isinstance(request, CompletionRequest):
            return [request.text]
        messages = [message.shown() for message in request.messages]
        options = request.chat_template_kwargs
        return [self._engine.render_chat(messages, tools=request.shown_tools, options=options)]

    def _count(
        self,
        request: InferenceRequest,
        rendered: Sequence[str],
        decision: Decision,
        obligations: Obligations,
        verdicts: tuple[Verdict, ...],
    ) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of every prompt: the exact count that limits are reserved by."""
        prompts = tuple(tuple(self._engine.encode(text, chat=isinstance(request, ChatRequest))) for text in rendered)
        field = request.prompt_field
        asked = (obligations.params.max_tokens or 1) if request.token_limit is not None else 1
        for prompt in prompts:
            if not prompt:
                raise Denied(errors.invalid_request("the prompt is empty", param=field), decision, verdicts)
            if asked > self._engine.context_length - len(prompt):
                error = errors.context_length_exceeded(self._engine.context_length, len(prompt), field)
                raise Denied(error, decision, verdicts)
        return prompts

    async def _sampling(
        self,
        request: InferenceRequest,
        rendered: Sequence[str],
        prompts: Sequence[Sequence[int]],
        decision: Decision,
        obligations: Obligations,
        verdicts: tuple[Verdict, ...],
    ) -> SamplingParams:
        """Return how the answer is sampled; what the engine cannot enforce of its structure is refused."""
        if isinstance(request, EmbeddingsRequest):
            return SamplingParams(max_tokens=1, seed=0)  # nothing is
        structure = structure_of(request, self._engine.dialect, rendered[0])
        if structure is not None:
            try:
                await self._engine.prepare(structure)
            except RequestRefused as refused:
                error = errors.invalid_request(str(refused), param=request.structure_field)
                raise Denied(error, decision, verdicts) from None
            except EngineDead:
                pass  # not the policy's word: the request goes on record, and then fails by name like every other
        # Unseeded means unpredictable, not unrepeatable: the seed that is drawn here is on record.
        seed = request.seed if request.seed is not None else int.from_bytes(self._random(8), "big") & MAX_SEED
        return _sampling(request, obligations, structure, self._engine.context_length - len(prompts[0]), seed)

    def _reserve(self, grant: Grant) -> None:
        """Reserve the prompt and the longest possible output in every bucket, or refuse."""
        question = grant.question
        outcome = self._ledger.reserve(
            question.request_id,
            Holder(question.principal.tenant, self._log.keyring.pseudonym(*_subject(question))),
            grant.obligations.limits,
            grant.reserved_tokens,
        )
        if isinstance(outcome, LimitRefusal):
            raise Denied(_limit_error(outcome), grant.decision, grant.verdicts)

    # --- on record ---

    def _received(self, grant: Grant) -> Record:
        question, model = grant.question, grant.model
        return request_received(
            tenant=question.principal.tenant,
            request_id=question.request_id,
            action=question.action,
            stream=question.request.stream,
            principal=principal_entry(question.principal),
            decision=decision_entry(grant.decision),
            model=ModelEntry(
                alias=question.request.model,
                version=model.digest,
                weights=model.weights,
                tokenizer=model.tokenizer,
                template=model.template,
                engine=self._engine.numeric_policy,
                adapter=model.adapter.digest if model.adapter is not None else None,
            ),
            sampling=_sampling_body(grant),
            guardrails=guardrail_entries(grant.verdicts),
            limits=limit_entries(grant.obligations.limits, grant.reserved_tokens),
            prompt_tokens=grant.prompt_tokens,
            identities=_identities(question),
            prompt=question.body,
            prompt_to_model=grant.prompt_to_model,
        )

    def _would_answer(self, question: Question, policy: EffectivePolicy | None) -> str:
        """Return the version that the alias of a denied request stands for, where the policy knows it and it is here;
        else that of the model alone."""
        model = policy.models.get(question.request.model) if policy is not None else None
        return model.version if model is not None and model.version in self._loaded else self._engine.model.digest

    async def _put_denial_on_record(
        self, question: Question, denied: Denied, policy: EffectivePolicy | None
    ) -> ApiError:
        record = request_denied(
            tenant=question.principal.tenant,
            request_id=question.request_id,
            action=question.action,
            principal=principal_entry(question.principal),
            decision=decision_entry(denied.decision),
            code=denied.error.code,
            model_alias=_known_alias(question, policy),
            guardrails=guardrail_entries(denied.verdicts),
            identities=_identities(question),
            prompt=question.body,
        )
        try:
            receipt = await self._log.append(record)
        except LogUnavailable:
            return errors.audit_unavailable()
        return denied.error.with_headers(
            {
                "probity-receipt": str(receipt),
                "probity-policy": denied.decision.policy,
                "probity-model": self._would_answer(question, policy),
            }
        )

    # --- the governed task ---

    def _govern(self, grant: Grant) -> Outbox:
        tenant = grant.question.principal.tenant
        generation = Generation(
            grant,
            engine=self._engine,
            log=self._log,
            ledger=self._ledger,
            telemetry=self._telemetry,
            monotonic=self._clock.monotonic,
            suspended=lambda: self._standings.suspended_meanwhile(tenant),
            cache_salt=self._salt(tenant),
            weight=self._weight(tenant),
            recorded=self._clock.monotonic(),
            rest_s=lambda: self._pace.rest_s(len(self._governed)),
        )
        task = asyncio.get_running_loop().create_task(generation.run())
        self._governed.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._governed.discard)
        task.add_done_callback(lambda _: self._leave(tenant))
        return generation.outbox

    def forget_cache(self, tenant: str) -> None:
        """Let nothing of what the engine computed for a tenant be found again."""
        self._engine.reset_cache(self._salt(tenant))

    @property
    def governed(self) -> int:
        """Requests received and not yet closed."""
        return len(self._governed)

    @property
    def draining(self) -> bool:
        return self._draining

    def stop_taking(self) -> None:
        """From now on every question is answered 503 `draining`."""
        self._draining = True

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new; return whether all that was taken ended within `timeout_s`."""
        self.stop_taking()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._entering or self._governed:
                    await (asyncio.wait(set(self._governed)) if self._governed else asyncio.sleep(ENTERING_POLL_S))
        return not (self._entering or self._governed)


def _known_alias(question: Question, policy: EffectivePolicy | None) -> str:
    """Return the alias as the policy writes it. One that it does not know is the caller's own text: it may name a
    person, a leaf cannot be erased, and the prompt as sent holds it anyway."""
    known = policy is not None and question.request.model in policy.models
    return question.request.model if known else UNKNOWN_ALIAS


def _shows_tokens(request: InferenceRequest) -> str | None:
    """Return the field that asks for tokens beside the text. Those of the prompt bring what would have followed."""
    if request.wants_logprobs:
        return "logprobs"
    asked = not isinstance(request, EmbeddingsRequest) and request.prompt_logprobs is not None
    return "prompt_logprobs" if asked else None


def _identities(question: Question) -> dict[str, str]:
    identities = {"subject": question.principal.subject}
    if question.source is not None:
        identities["source"] = question.source
    return identities


def _subject(question: Question) -> tuple[str, str, str]:
    """The ledger counts by pseudonym, because that is what it can be rebuilt from."""
    return question.principal.tenant, "subject", question.principal.subject


def _sampling_body(grant: Grant) -> dict[str, Json]:
    request = grant.question.request
    if isinstance(request, EmbeddingsRequest):
        return pooling_body(request.pooling, request.outputs)
    return sampling_body(grant.sampling, request.choices, grant.obligations)


def _sampling(
    request: TextRequest, obligations: Obligations, structure: Structure | None, room: int, seed: int
) -> SamplingParams:
    params = obligations.params
    return SamplingParams(
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        seed=seed,
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=request.top_k or 0,
        min_p=float(request.min_p or 0),
        stop=request.stops,
        ignore_eos=request.ignore_eos,
        logit_bias=request.biases,
        repetition_penalty=float(1 if request.repetition_penalty is None else request.repetition_penalty),
        frequency_penalty=float(request.frequency_penalty or 0),
        presence_penalty=float(request.presence_penalty or 0),
        allowed_tokens=request.allowed_tokens,
        stop_tokens=request.stop_tokens,
        min_tokens=request.min_tokens or 0,
        structure=structure,
        prompt_logprobs=request.prompt_logprobs,
        logprobs=request.wants_logprobs,
        top_logprobs=request.alternatives,
    )


def _denial(decision: Decision) -> ApiError:
    """Return what the caller is told of a deny. Unknown and disallowed models get the same answer."""
    reason = decision.reasons[0]
    if decision.denied_by is DeniedBy.MODEL:
        return errors.model_not_found()
    if decision.denied_by is DeniedBy.PARAMETER:
        return errors.invalid_request("the policy does not allow this value", param=reason.detail)
    return errors.policy_denied(f"denied by policy: {reason.code}")


def _limit_error(refusal: LimitRefusal) -> ApiError:
    if refusal.quota:
        return errors.insufficient_quota(refusal.limit_id)
    return errors.rate_limit_exceeded(refusal.limit_id, refusal.retry_after_s)
