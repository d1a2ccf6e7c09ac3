"""A decision is a value: an effect, its reasons, and what must be done if it is an allow.

An allow without obligations does not exist; a deny has none. Knows no document: evaluate.py makes these from one.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum


class Effect(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


class DeniedBy(StrEnum):
    """Which question was answered with no; the gateway tells callers apart by it."""

    RULE = "rule"
    MODEL = "model"
    PARAMETER = "parameter"
    STATUS = "status"  # the tenant is suspended
    ERROR = "error"  # evaluation failed: errors deny


class Stage(StrEnum):
    INPUT = "input"
    OUTPUT = "output"


class Action(StrEnum):
    BLOCK = "block"
    REDACT = "redact"
    FLAG = "flag"


class Scope(StrEnum):
    TENANT = "tenant"
    SUBJECT = "subject"


class LimitKind(StrEnum):
    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOKENS_PER_DAY = "tokens_per_day"
    CONCURRENCY = "concurrency"


class StreamingMode(StrEnum):
    WINDOW = "window"  # what may be part of a match is held, at most the last `hold_chars`
    HOLD_ALL = "hold_all"  # nothing is released before the answer is whole


@dataclass(frozen=True, slots=True)
class Reason:
    code: str  # a rule's own reason, or one of: default_deny, rule, model_…, parameter_…, suspended, error
    rule: str | None = None
    detail: str | None = None  # a name of ours, such as a parameter; never what the caller sent


@dataclass(frozen=True, slots=True)
class ModelGrant:
    alias: str
    version: str  # `sha256:<64 hex>`
    approval: str


@dataclass(frozen=True, slots=True)
class GrantedParams:
    max_tokens: int | None  # None: no rule says; the context is the bound
    temperature: Decimal
    top_p: Decimal
    n: int


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A parameter that the policy clamped."""

    param: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class GuardrailSpec:
    id: str
    detector: str
    stage: Stage
    action: Action
    entities: tuple[str, ...]  # sorted; what the detector looks for
    mode: StreamingMode | None  # output only
    hold_chars: int  # output, window: ≥ the longest span the detector can match

    @property
    def withholds_output(self) -> bool:
        return self.stage is Stage.OUTPUT and self.action is not Action.FLAG


@dataclass(frozen=True, slots=True)
class LimitSpec:
    id: str  # the name in the document
    scope: Scope
    kind: LimitKind
    maximum: int


@dataclass(frozen=True, slots=True)
class RecordSpec:
    id: str
    content: str  # encrypted
    retain_days: int
    hot_days: int


@dataclass(frozen=True, slots=True)
class Obligations:
    model: ModelGrant
    params: GrantedParams
    adjustments: tuple[Adjustment, ...]
    guardrails: tuple[GuardrailSpec, ...]
    limits: tuple[LimitSpec, ...]
    record: RecordSpec | None


@dataclass(frozen=True, slots=True)
class Decision:
    effect: Effect
    reasons: tuple[Reason, ...]  # at least one
    policy: str  # digest of the effective document
    denied_by: DeniedBy | None = None
    obligations: Obligations | None = None

    @classmethod
    def deny(cls, by: DeniedBy, policy: str, *reasons: Reason) -> Decision:
        return cls(Effect.DENY, reasons, policy, by)
