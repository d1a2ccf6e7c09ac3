"""Deciding: a request and an effective policy in, a decision with reasons and obligations out.

Pure, and it cannot fail open: default deny, deny overrides, an error is a deny that says so. Rules are compiled once
per policy into tests over sets, so a decision costs microseconds; tests/support/naive_policy.py decides the slow,
obvious way, and hypothesis holds the two together.

Order: rules (the floor's first) → model → parameters. What several matching allows oblige to is combined to the
strictest. Knows no clock: the moment is in the request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from policies.decision import (
    Adjustment,
    Decision,
    DeniedBy,
    Effect,
    GrantedParams,
    GuardrailSpec,
    LimitKind,
    LimitSpec,
    ModelGrant,
    Obligations,
    Reason,
    RecordSpec,
    Scope,
)
from policies.document import (
    WEEKDAYS,
    EffectivePolicy,
    Guardrail,
    Hours,
    Limits,
    Params,
    PolicyDocument,
    RecordClass,
    Rule,
    When,
    clock_time,
    period_days,
)
from policies.request import AccessRequest, RequestedParams

DEFAULT_TEMPERATURE = Decimal(1)  # OpenAI's defaults
DEFAULT_TOP_P = Decimal(1)
_UTC = timedelta(0)

Condition = Callable[[AccessRequest, frozenset[str]], bool]  # (request, data classes of its purpose)


def evaluate(request: AccessRequest, policy: EffectivePolicy, loaded: frozenset[str]) -> Decision:
    """Decide. `loaded` are the digests of the model versions that the engine has."""
    try:
        return _decide(request, _compiled(policy), loaded)
    except Exception as error:  # errors deny: whatever went wrong, this is not an allow
        return Decision.deny(DeniedBy.ERROR, policy.digest, Reason("error", detail=type(error).__name__))


# --- compiled ---


@dataclass(frozen=True, slots=True)
class _CompiledRule:
    id: str
    reason: str
    conditions: tuple[Condition, ...]  # cheap ones first
    but_for_model: tuple[Condition, ...]  # the same without the one on the model
    rule: Rule


@dataclass(frozen=True)
class _Compiled:
    policy: EffectivePolicy
    digest: str
    denies: tuple[_CompiledRule, ...]
    allows: tuple[_CompiledRule, ...]
    classes: dict[str, frozenset[str]]  # purpose → data classes
    expires: dict[str, date]  # alias → the last day of its approval
    obligations: dict[tuple[str, ...], _Combined]  # ids of matching allows → what they oblige to; bounded by eviction


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What all bounds on one parameter come to."""

    usual: int | Decimal | None  # granted where nothing was asked
    maximum: int | Decimal | None  # above it, the request is clamped
    refused_above: int | Decimal | None  # above it, the request is refused


@dataclass(frozen=True, slots=True)
class _Combined:
    params: tuple[tuple[str, _Bounds], ...]  # in the order of GrantedParams
    guardrails: tuple[GuardrailSpec, ...]
    limits: tuple[LimitSpec, ...]
    record: RecordSpec | None


MAX_COMBINATIONS = 256


_CACHE: dict[str, _Compiled] = {}  # digest → compiled
MAX_COMPILED = 1024


def _compiled(policy: EffectivePolicy) -> _Compiled:
    compiled = _CACHE.get(policy.digest)
    if compiled is None:
        compiled = _compile_policy(policy)
        if len(_CACHE) >= MAX_COMPILED:
            _CACHE.clear()
        _CACHE[policy.digest] = compiled
    return compiled


def _compile_policy(policy: EffectivePolicy) -> _Compiled:
    documents = [document for document in (policy.floor, policy.document) if document is not None]
    rules = [_compile(rule) for document in documents for rule in document.rules]
    return _Compiled(
        policy=policy,
        digest=policy.digest,
        denies=tuple(rule for rule in rules if rule.rule.effect == "deny"),
        allows=tuple(rule for rule in rules if rule.rule.effect == "allow"),
        classes=_data_classes(documents),
        expires={alias: date.fromisoformat(model.expires) for alias, model in policy.models.items()},
        obligations={},
    )


def _data_classes(documents: Iterable[PolicyDocument]) -> dict[str, frozenset[str]]:
    """Return each purpose's data classes; where the floor defines it too, a tenant cannot take any away."""
    classes: dict[str, frozenset[str]] = {}
    for document in documents:
        for purpose in document.purposes:
            classes[purpose.id] = classes.get(purpose.id, frozenset()) | frozenset(purpose.data_classes)
    return classes


def _compile(rule: Rule) -> _CompiledRule:
    return _CompiledRule(
        id=rule.id,
        reason=rule.reason or "rule",
        conditions=tuple(_conditions(rule.when)),
        but_for_model=tuple(_conditions(rule.when.model_copy(update={"models_any": None}))),
        rule=rule,
    )


def _conditions(when: When) -> Iterable[Condition]:
    if when.actions_any:
        yield _member(when.actions_any, lambda request: request.action)
    if when.models_any:
        yield _member(when.models_any, lambda request: request.model)
    if when.purposes_any:
        yield _member(when.purposes_any, lambda request: request.purpose)
    if when.clients_any:
        yield _member(when.clients_any, lambda request: request.principal.client)
    if when.roles_any:
        roles = frozenset(when.roles_any)
        yield lambda request, _: not roles.isdisjoint(request.principal.roles)
    if when.data_classes_any:
        wanted = frozenset(when.data_classes_any)
        yield lambda _, classes: not wanted.isdisjoint(classes)
    if when.hours_utc:
        yield _within_hours(when.hours_utc)
    if when.source_cidrs:
        yield _from_network(when.source_cidrs)


def _member(values: Iterable[str], attribute: Callable[[AccessRequest], str | None]) -> Condition:
    allowed = frozenset(values)  # None is never a member: a missing attribute satisfies nothing
    return lambda request, _: attribute(request) in allowed


def _within_hours(hours: Hours) -> Condition:
    start, end = clock_time(hours.start), clock_time(hours.end)
    days = frozenset(WEEKDAYS.index(day) for day in hours.days)

    def within(request: AccessRequest, _: frozenset[str]) -> bool:
        moment = request.at
        now, day = moment.time(), moment.weekday()
        if start < end:
            return day in days and start <= now < end
        # Past midnight: the early hours belong to the day before.
        return (now >= start and day in days) or (now < end and (day - 1) % 7 in days)

    return within


def _from_network(cidrs: Iterable[str]) -> Condition:
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]

    def inside(request: AccessRequest, _: frozenset[str]) -> bool:
        if request.source is None:
            return False
        address = _address(request.source)
        return any(address.version == network.version and address in network for network in networks)

    return inside


@lru_cache(maxsize=4096)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


# --- deciding ---


def _decide(request: AccessRequest, compiled: _Compiled, loaded: frozenset[str]) -> Decision:
    if request.at.utcoffset() != _UTC:
        raise ValueError("a request's moment is in UTC")
    if request.principal.tenant != compiled.policy.tenant:
        return Decision.deny(DeniedBy.RULE, compiled.digest, Reason("other_tenant"))
    classes = compiled.classes.get(request.purpose or "", frozenset())
    denying = [rule for rule in compiled.denies if _matches(rule, request, classes)]
    if denying:
        reasons = tuple(Reason(rule.reason, rule.id) for rule in denying)
        return Decision.deny(DeniedBy.RULE, compiled.digest, *reasons)
    allowing = [rule for rule in compiled.allows if _matches(rule, request, classes)]
    if not allowing:
        return _nothing_allows(request, compiled, classes)
    model = compiled.policy.document.models.get(request.model)
    if model is None:
        return Decision.deny(DeniedBy.MODEL, compiled.digest, Reason("model_unknown"))
    refusal = _model_refusal(model.version, compiled.expires[request.model], request.at, loaded)
    if refusal is not None:
        return Decision.deny(DeniedBy.MODEL, compiled.digest, Reason(refusal))
    combined = _combined(compiled, allowing)
    params, adjustments, excess = _grant(request.params, combined.params)
    if excess is not None:
        return Decision.deny(DeniedBy.PARAMETER, compiled.digest, Reason("parameter_exceeds", detail=excess))
    return Decision(
        effect=Effect.ALLOW,
        reasons=tuple(Reason("rule", rule.id) for rule in allowing),
        policy=compiled.digest,
        obligations=Obligations(
            model=ModelGrant(request.model, model.version, model.approval),
            params=params,
            adjustments=adjustments,
            guardrails=combined.guardrails,
            limits=combined.limits,
            record=combined.record,
        ),
    )


def _matches(rule: _CompiledRule, request: AccessRequest, classes: frozenset[str]) -> bool:
    for condition in rule.conditions:  # noqa: SIM110 - a generator would cost as much as the conditions
        if not condition(request, classes):
            return False
    return True


def _nothing_allows(request: AccessRequest, compiled: _Compiled, classes: frozenset[str]) -> Decision:
    """Default deny. If only the model stands in the way, say so: unknown and disallowed models get one answer."""
    but_for_model = any(
        all(condition(request, classes) for condition in rule.but_for_model) for rule in compiled.allows
    )
    by = DeniedBy.MODEL if but_for_model else DeniedBy.RULE
    return Decision.deny(by, compiled.digest, Reason("model_not_allowed" if but_for_model else "default_deny"))


def _model_refusal(version: str, expires: date, at: datetime, loaded: frozenset[str]) -> str | None:
    if at.date() > expires:
        return "model_approval_expired"
    return None if version in loaded else "model_not_loaded"


# --- obligations: the strictest of all that match, and of the floor ---


def _combined(compiled: _Compiled, allowing: list[_CompiledRule]) -> _Combined:
    key = tuple(rule.id for rule in allowing)
    combined = compiled.obligations.get(key)
    if combined is None:
        combined = _combine(compiled.policy, [rule.rule for rule in allowing])
        if len(compiled.obligations) >= MAX_COMBINATIONS:
            compiled.obligations.clear()
        compiled.obligations[key] = combined
    return combined


def _combine(policy: EffectivePolicy, rules: list[Rule]) -> _Combined:
    document, floor = policy.document, policy.floor
    params = [document.params[rule.with_.params] for rule in rules if rule.with_.params]
    limits = {rule.with_.limits: document.limits[rule.with_.limits] for rule in rules if rule.with_.limits}
    guardrails = {name: document.guardrails[name] for rule in rules for name in rule.with_.guardrails}
    records = {rule.with_.record: document.records[rule.with_.record] for rule in rules if rule.with_.record}
    if floor is not None:
        params += floor.params.values()
        limits |= floor.limits
        guardrails |= floor.guardrails
        records |= floor.records
    return _Combined(
        params=_bounds(params),
        guardrails=tuple(_guardrail(name, guardrails[name]) for name in sorted(guardrails)),
        limits=_strictest_limits(limits),
        record=_longest_kept(records),
    )


def _guardrail(name: str, guardrail: Guardrail) -> GuardrailSpec:
    streaming = guardrail.streaming
    return GuardrailSpec(
        id=name,
        detector=guardrail.detector,
        stage=guardrail.stage,
        action=guardrail.action,
        entities=tuple(sorted(guardrail.entities)),
        mode=streaming.mode if streaming is not None else None,
        hold_chars=(streaming.hold_chars or 0) if streaming is not None else 0,
    )


def _strictest_limits(limits: dict[str, Limits]) -> tuple[LimitSpec, ...]:
    """Return the smallest maximum of each (scope, kind); ties go to the first name."""
    strictest: dict[tuple[Scope, LimitKind], LimitSpec] = {}
    for name in sorted(limits):
        for scope, buckets in ((Scope.SUBJECT, limits[name].per_subject), (Scope.TENANT, limits[name].per_tenant)):
            for kind in LimitKind:
                maximum = getattr(buckets, kind.value)
                held = strictest.get((scope, kind))
                if maximum is not None and (held is None or maximum < held.maximum):
                    strictest[scope, kind] = LimitSpec(name, scope, kind, maximum)
    return tuple(strictest[key] for key in sorted(strictest))


def _longest_kept(records: dict[str, RecordClass]) -> RecordSpec | None:
    """Return the class that is kept longest, hot for as long as any of them is."""
    kept = [
        RecordSpec(name, record.content, period_days(record.retain), period_days(record.hot))
        for name, record in sorted(records.items())
    ]
    longest = max(kept, key=lambda record: record.retain_days, default=None)
    return None if longest is None else replace(longest, hot_days=max(record.hot_days for record in kept))


def _bounds(params: list[Params]) -> tuple[tuple[str, _Bounds], ...]:
    """Return what holds for each parameter.

    Each bound says itself what exceeding it does: one that rejects is not softened by another that clamps, and one that
    clamps is not hardened by one that was kept. What the caller leaves open gets its default, or the bound where that
    is lower: nothing was asked, nothing exceeded.
    """
    tokens = [bound.max_output_tokens for bound in params if bound.max_output_tokens]
    return (
        ("max_tokens", _bound(params, "max_output_tokens", min((b.default or b.max for b in tokens), default=None))),
        ("temperature", _bound(params, "temperature", DEFAULT_TEMPERATURE)),
        ("top_p", _bound(params, "top_p", DEFAULT_TOP_P)),
        ("n", _bound(params, "n", 1)),
    )


def _bound(params: list[Params], member: str, usual: int | Decimal | None) -> _Bounds:
    given = [(getattr(bound, member).max, bound.on_excess) for bound in params if getattr(bound, member) is not None]
    maximum = min((most for most, _ in given), default=None)
    return _Bounds(
        usual=usual if maximum is None or usual is None else min(usual, maximum),
        maximum=maximum,
        refused_above=min((most for most, on_excess in given if on_excess == "reject"), default=None),
    )


def _grant(
    asked: RequestedParams, params: tuple[tuple[str, _Bounds], ...]
) -> tuple[GrantedParams, tuple[Adjustment, ...], str | None]:
    """Return what is granted, what was clamped, and the first parameter that is refused, if one is."""
    granted: list[Any] = []
    adjustments: tuple[Adjustment, ...] = ()
    values = (asked.max_tokens, asked.temperature, asked.top_p, asked.n)
    refused: str | None = None
    for value, (name, bounds) in zip(values, params, strict=True):
        if value is None:
            granted.append(bounds.usual)
        elif bounds.maximum is None or value <= bounds.maximum:
            granted.append(value)
        else:
            granted.append(bounds.maximum)
            adjustments += (Adjustment(name, str(value), str(bounds.maximum)),)
            if refused is None and bounds.refused_above is not None and value > bounds.refused_above:
                refused = name
    return GrantedParams(*granted), adjustments, refused
