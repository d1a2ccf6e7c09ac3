"""The policy document: YAML for authors, typed and frozen for us, canonical JSON for its identity.

One complete example is policies/bundles/acme-bank.yaml; golden digests stand in tests/golden/policies/. A name that is
referred to must be defined; a field that is not known is refused; every finding carries its path. A document alone is
not yet a policy: `compose` joins it with the organisation's floor, and a tenant may only tighten.

Knows no requests: evaluate.py decides. Source: policy.md.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from policies.decision import Action, LimitKind, Stage, StreamingMode
from policies.guardrails.detectors import DETECTORS, longest_span

MAX_DOCUMENT_BYTES = 1 << 18  # PyYAML reads some 100 KB a second
MAX_FINDINGS = 100  # of one document; who corrects them sees the rest
MAX_DEPTH = 16

# All rules of one effect may match one request, and the decision names each: it must have room on record, in a leaf of
# 65,535 bytes, together with what the floor's rules and guardrails say of it.
MAX_REASON_BYTES = 24_576  # of the reasons of all rules of one effect; 250 rules with the longest ids, 600 with short
MAX_VERDICT_BYTES = 12_288  # of the verdicts of all guardrails; 18 of the longest, 80 that look for one thing each
_REASON_FORM = len('{"code":"","rule":""},')
_VERDICT_FORM = len('{"action":"redact","counts":{},"detector":"","id":"","stage":"output","verdict":"redacted"},')
_COUNT_FORM = len('"":9999999,')
API_VERSION = "policy/v1"
FLOOR_TENANT = "*"  # whose policy is every tenant's floor

# PolicyInvalid    the document is refused; `findings` says where and why, the first hundred


@dataclass(frozen=True, slots=True)
class Finding:
    path: str  # e.g. `rules[2].with.limits`
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class PolicyInvalid(ValueError):
    """A document is refused."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("; ".join(map(str, findings)))
        self.findings = findings


_DECIMAL = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,6})?")


def _decimal(value: object) -> object:
    if isinstance(value, str):
        if _DECIMAL.fullmatch(value) is None:
            raise ValueError('must be a decimal in quotes, such as "0.7"')
        return Decimal(value)
    raise ValueError('must be a decimal in quotes, such as "0.7": a bare number has no one text')


def _action(value: object) -> object:
    if value == "pseudonymise":
        raise ValueError("`pseudonymise` is not supported yet; use `redact`")
    return value


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Role = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
DecimalText = Annotated[
    Decimal,
    BeforeValidator(_decimal),
    PlainSerializer(lambda value: format(value.normalize(), "f"), return_type=str),
]
Period = Annotated[str, Field(pattern=r"^P[1-9][0-9]{0,4}[DMY]$")]
Clock = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

# The actions of the gateway that a rule may name.
ACTIONS = frozenset({"chat.completions", "completions", "embeddings", "responses"})


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Purpose(_Part):
    id: Name
    data_classes: tuple[Name, ...] = ()


class Hours(_Part):
    """Days and times in UTC; start inclusive, end exclusive; an end before the start runs past midnight."""

    days: Annotated[tuple[Weekday, ...], Field(min_length=1)]
    start: Clock
    end: Clock


class When(_Part):
    """All conditions that are given must hold; each holds if any of its values does. An absent attribute never does."""

    roles_any: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None
    clients_any: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None
    actions_any: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    purposes_any: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    models_any: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    data_classes_any: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    source_cidrs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    hours_utc: Hours | None = None


class With(_Part):
    """What an allow obliges to; each value names a section entry."""

    limits: Name | None = None
    guardrails: tuple[Name, ...] = ()
    params: Name | None = None
    record: Name | None = None


class Rule(_Part):
    id: Name
    effect: Literal["allow", "deny"]
    reason: Name | None = None
    when: When = When()
    with_: With = Field(default=With(), alias="with")


class ModelEntry(_Part):
    version: Digest
    approval: Annotated[str, Field(min_length=1, max_length=128)]
    expires: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]


class MaxTokens(_Part):
    max: Annotated[int, Field(ge=1, le=1_000_000)]
    default: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class MaxTemperature(_Part):
    max: Annotated[DecimalText, Field(ge=0, le=2)]


class MaxTopP(_Part):
    max: Annotated[DecimalText, Field(gt=0, le=1)]


class MaxChoices(_Part):
    max: Annotated[int, Field(ge=1, le=16)]


class Params(_Part):
    max_output_tokens: MaxTokens | None = None
    temperature: MaxTemperature | None = None
    top_p: MaxTopP | None = None
    n: MaxChoices | None = None
    on_excess: Literal["reject", "clamp"] = "reject"


Count = Annotated[int, Field(ge=1, le=10**12)]


class Buckets(_Part):
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    concurrency: Count | None = None


class Limits(_Part):
    per_subject: Buckets = Buckets()
    per_tenant: Buckets = Buckets()


class Streaming(_Part):
    mode: StreamingMode
    hold_chars: Annotated[int, Field(ge=1, le=65_536)] | None = None


class Guardrail(_Part):
    detector: Name
    stage: Stage
    action: Annotated[Action, BeforeValidator(_action)]
    entities: tuple[Name, ...] = ()
    on_error: Literal["block"] = "block"
    streaming: Streaming | None = None


class RecordClass(_Part):
    content: Literal["encrypted"]
    retain: Period
    hot: Period


class Controls(_Part):
    audit_unavailable: Literal["deny"] = "deny"


class PolicyDocument(_Part):
    api_version: Literal["policy/v1"]
    tenant: Annotated[str, Field(pattern=r"^(\*|[a-z0-9][a-z0-9-]{0,62})$")]
    name: Name
    extends: Name | None = None
    default: Literal["deny"]
    purposes: tuple[Purpose, ...] = ()
    rules: tuple[Rule, ...] = ()
    models: dict[Name, ModelEntry] = {}
    params: dict[Name, Params] = {}
    limits: dict[Name, Limits] = {}
    guardrails: dict[Name, Guardrail] = {}
    records: dict[Name, RecordClass] = {}
    controls: Controls = Controls()

    def canonical(self) -> bytes:
        """Return the document's one text: keys sorted, absent members left out, decimals as text."""
        value = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# --- reading ---


class _StrictLoader(yaml.SafeLoader):
    """YAML with one meaning: no anchors, aliases, tags or duplicate keys, bounded depth; scalars as JSON has them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise PolicyInvalid([Finding(_line(event), "aliases are not allowed; write it out")])
        if getattr(event, "anchor", None) is not None:
            raise PolicyInvalid([Finding(_line(event), "anchors are not allowed; write it out")])
        if getattr(event, "tag", None) is not None:
            raise PolicyInvalid([Finding(_line(event), "tags are not allowed")])
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > MAX_DEPTH:
            raise PolicyInvalid([Finding(_line(event), f"nested deeper than {MAX_DEPTH}")])
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[str] = set()
        for position, key in enumerate(keys):
            if not isinstance(key, str):
                raise PolicyInvalid([Finding(_line(node), "a key must be a text")])
            if key in seen:
                raise PolicyInvalid(
                    [Finding(f"line {node.value[position][0].start_mark.line + 1}", "a key is given twice")]
                )
            seen.add(key)
        return super().construct_mapping(node, deep=True)


# Only what JSON has: `on`, `yes`, dates, octals and sexagesimals stay text.
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", "tf"),
    ("tag:yaml.org,2002:null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("tag:yaml.org,2002:int", r"^-?(?:0|[1-9][0-9]*)$", "-0123456789"),
    ("tag:yaml.org,2002:float", r"^-?(?:0|[1-9][0-9]*)\.[0-9]+$", "-0123456789"),
):
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def _line(mark: Any) -> str:
    return f"line {mark.start_mark.line + 1}"


def parse_policy(text: str) -> PolicyDocument:
    """Read a document. JSON is YAML, so both come in here.

    Raises:
        PolicyInvalid: with every finding.
    """
    if len(text.encode("utf-8", "replace")) > MAX_DOCUMENT_BYTES:
        raise PolicyInvalid([Finding("document", f"longer than {MAX_DOCUMENT_BYTES} bytes")])
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader, and stricter
    except PolicyInvalid:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark is not None else "document"
        raise PolicyInvalid([Finding(where, "not well-formed YAML")]) from error
    return read_document(value)


def read_submitted(value: object) -> PolicyDocument:
    """Read what somebody sent: a text, or plain values as JSON gave them; both are bounded. Raises PolicyInvalid.

    Cost: up to three seconds for YAML of the greatest length.
    """
    if isinstance(value, str):
        return parse_policy(value)
    if len(json.dumps(value, ensure_ascii=False)) > MAX_DOCUMENT_BYTES:
        raise PolicyInvalid([Finding("document", f"longer than {MAX_DOCUMENT_BYTES} bytes")])
    return read_document(value)


def read_document(value: object) -> PolicyDocument:
    """Check plain values, as YAML or JSON gave them. Raises PolicyInvalid."""
    try:
        document = PolicyDocument.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        raise PolicyInvalid([_finding(one) for one in wrong[:MAX_FINDINGS]]) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PolicyInvalid([Finding("document", "not a policy document")]) from error
    findings = list(islice(_check(document), MAX_FINDINGS))
    if findings:
        raise PolicyInvalid(findings)
    return document


def _finding(error: Any) -> Finding:
    path = ""
    for step in error["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return Finding(path or "document", str(error["msg"]).removeprefix("Value error, "))


# --- checking: every name that is referred to is defined, every allow says who and which model ---


def _check(document: PolicyDocument) -> Iterator[Finding]:
    seen: set[str] = set()
    defined = frozenset(purpose.id for purpose in document.purposes)
    for position, rule in enumerate(document.rules):
        path = f"rules[{position}]"
        if rule.id in seen:
            yield Finding(f"{path}.id", f"`{rule.id}` is the id of another rule")
        seen.add(rule.id)
        yield from _check_rule(document, rule, defined, path)
    purposes: set[str] = set()
    for position, purpose in enumerate(document.purposes):
        if purpose.id in purposes:
            yield Finding(f"purposes[{position}].id", f"`{purpose.id}` is defined twice")
        purposes.add(purpose.id)
    yield from _check_room(document)
    for name, guardrail in document.guardrails.items():
        yield from _check_guardrail(guardrail, f"guardrails.{name}")
    for name, params in document.params.items():
        tokens = params.max_output_tokens
        if tokens is not None and tokens.default is not None and tokens.default > tokens.max:
            yield Finding(f"params.{name}.max_output_tokens.default", "is above `max`")
    for name, record in document.records.items():
        if period_days(record.hot) > period_days(record.retain):
            yield Finding(f"records.{name}.hot", "is longer than `retain`")
    for name, model in document.models.items():
        if _date(model.expires) is None:
            yield Finding(f"models.{name}.expires", "is not a date")


def _check_room(document: PolicyDocument) -> Iterator[Finding]:
    """Find what would be too long to be put on record, were all of it to concern one request."""
    for effect in ("allow", "deny"):
        named = [rule for rule in document.rules if rule.effect == effect]
        size = sum(_REASON_FORM + len(rule.reason or "rule") + len(rule.id) for rule in named)
        if size > MAX_REASON_BYTES:
            told = f"the reasons of all {effect} rules take {size} bytes on record, and there is room for"
            yield Finding("rules", f"{told} {MAX_REASON_BYTES}; join rules, or shorten their ids")
    size = sum(_verdict_size(name, guardrail) for name, guardrail in document.guardrails.items())
    if size > MAX_VERDICT_BYTES:
        told = f"the verdicts of all of them take {size} bytes on record, and there is room for {MAX_VERDICT_BYTES}"
        yield Finding("guardrails", f"{told}; join guardrails, or shorten their ids")


def _verdict_size(name: str, guardrail: Guardrail) -> int:
    """Return the most bytes that what a guardrail found takes in a leaf."""
    detector = DETECTORS.get(guardrail.detector)
    entities = guardrail.entities or (() if detector is None else tuple(detector.entities))
    return _VERDICT_FORM + len(name) + len(guardrail.detector) + sum(_COUNT_FORM + len(entity) for entity in entities)


def _check_rule(document: PolicyDocument, rule: Rule, purposes: frozenset[str], path: str) -> Iterator[Finding]:
    when = rule.when
    if rule.effect == "allow" and not (when.roles_any or when.clients_any):
        yield Finding(f"{path}.when", "an allow must say who: give `roles_any` or `clients_any`")
    if rule.effect == "allow" and not when.models_any:
        yield Finding(f"{path}.when", "an allow must say which model: give `models_any`")
    if rule.effect == "deny" and rule.with_ != With():
        yield Finding(f"{path}.with", "a deny has no obligations; leave `with` out")
    for action in set(when.actions_any or ()) - ACTIONS:
        yield Finding(
            f"{path}.when.actions_any", f"`{action}` is not an action; there are {', '.join(sorted(ACTIONS))}"
        )
    for position, cidr in enumerate(when.source_cidrs or ()):
        try:
            ipaddress.ip_network(cidr)
        except ValueError:
            yield Finding(f"{path}.when.source_cidrs[{position}]", "is not a network, such as `10.20.0.0/16`")
    if when.hours_utc is not None and when.hours_utc.start == when.hours_utc.end:
        yield Finding(f"{path}.when.hours_utc", "`start` and `end` are the same; leave the hours out for all day")
    defined: list[tuple[str, tuple[str, ...], object]] = [
        ("when.purposes_any", when.purposes_any or (), purposes),
        ("when.models_any", when.models_any or (), document.models),
        ("with.guardrails", rule.with_.guardrails, document.guardrails),
        ("with.limits", (rule.with_.limits,) if rule.with_.limits else (), document.limits),
        ("with.params", (rule.with_.params,) if rule.with_.params else (), document.params),
        ("with.record", (rule.with_.record,) if rule.with_.record else (), document.records),
    ]
    for where, names, known in defined:
        if where == "when.models_any" and document.tenant == FLOOR_TENANT:
            continue  # a floor denies models that it does not define
        for name in names:
            if name not in known:  # type: ignore[operator]
                yield Finding(f"{path}.{where}", f"`{name}` is not defined")


def _check_guardrail(guardrail: Guardrail, path: str) -> Iterator[Finding]:
    detector = DETECTORS.get(guardrail.detector)
    if detector is None:
        yield Finding(f"{path}.detector", f"`{guardrail.detector}` is not a detector; there are {', '.join(DETECTORS)}")
        return
    for entity in set(guardrail.entities) - detector.entities:
        yield Finding(f"{path}.entities", f"`{entity}` is not one that `{guardrail.detector}` finds")
    if guardrail.stage is Stage.INPUT:
        if guardrail.streaming is not None:
            yield Finding(f"{path}.streaming", "an input guardrail does not stream; leave it out")
        return
    if guardrail.action is Action.FLAG:
        return
    if guardrail.streaming is None:
        yield Finding(f"{path}.streaming", "an enforcing output guardrail says `window` or `hold_all`")
        return
    if guardrail.streaming.mode is StreamingMode.WINDOW:
        needed = longest_span(guardrail.detector, guardrail.entities)
        if needed is None:
            yield Finding(f"{path}.streaming.mode", "the detector's matches have no longest length: use `hold_all`")
        elif (guardrail.streaming.hold_chars or 0) < needed:
            yield Finding(f"{path}.streaming.hold_chars", f"must be at least {needed}: the longest that it can match")


def warnings(document: PolicyDocument, today: date) -> list[Finding]:
    """Return what is allowed and probably not meant: a rule that can never match, an approval that has expired."""
    found = [
        Finding(
            f"rules[{position}].when.data_classes_any", "no purpose has these data classes: the rule can never match"
        )
        for position, rule in enumerate(document.rules)
        if document.tenant != FLOOR_TENANT and _never_matches(document, rule.when)
    ]
    for name, model in document.models.items():
        expires = _date(model.expires)
        if expires is not None and expires < today:
            found.append(Finding(f"models.{name}.expires", "the approval has expired: the model is denied"))
    return found


def _never_matches(document: PolicyDocument, when: When) -> bool:
    """Say whether no purpose that the rule takes has a data class that it asks for."""
    if when.data_classes_any is None:
        return False
    wanted = set(when.data_classes_any)
    taken = [p for p in document.purposes if when.purposes_any is None or p.id in when.purposes_any]
    return all(wanted.isdisjoint(purpose.data_classes) for purpose in taken)


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


# --- composing: organisation floor ∘ tenant ---


@dataclass(frozen=True)
class EffectivePolicy:
    """What decides: a tenant's document under the organisation's floor. Its digest is its identity."""

    floor: PolicyDocument | None
    document: PolicyDocument

    @cached_property
    def digest(self) -> str:
        """`sha256:<64 hex>` of the canonical JSON of both."""
        floor = self.floor.canonical() if self.floor is not None else b"null"
        joined = b'{"document":' + self.document.canonical() + b',"floor":' + floor + b"}"
        return "sha256:" + hashlib.sha256(joined).hexdigest()

    @property
    def tenant(self) -> str:
        return self.document.tenant

    @property
    def models(self) -> Mapping[str, ModelEntry]:
        return self.document.models


def compose(floor: PolicyDocument | None, document: PolicyDocument) -> EffectivePolicy:
    """Join a tenant's document with the floor. The floor's denies and obligations hold for every request as well.

    A tenant may only tighten: where it says something about a limit, a parameter, a purpose or a record class that the
    floor names too, it may not say more.

    Raises:
        PolicyInvalid: it loosens; each finding carries the path of the offence. Or the floor cannot be one.
    """
    if floor is not None:
        check_floor(floor)
    findings = [] if floor is None else list(_loosenings(floor, document))
    if floor is None and document.extends is not None:
        findings.append(Finding("extends", f"there is no floor `{document.extends}`"))
    if floor is not None and document.extends is not None and document.extends != floor.name:
        findings.append(Finding("extends", f"the floor is `{floor.name}`"))
    if findings:
        raise PolicyInvalid(findings)
    return EffectivePolicy(floor, document)


def _loosenings(floor: PolicyDocument, document: PolicyDocument) -> Iterator[Finding]:
    for name, params in document.params.items():
        for own in floor.params.values():
            yield from _more_params(params, own, f"params.{name}")
    for name, limits in document.limits.items():
        for bound in floor.limits.values():
            for scope in ("per_subject", "per_tenant"):
                yield from _more_buckets(getattr(limits, scope), getattr(bound, scope), f"limits.{name}.{scope}")
    for name in document.guardrails.keys() & floor.guardrails.keys():
        if document.guardrails[name] != floor.guardrails[name]:
            yield Finding(f"guardrails.{name}", "the floor defines it; leave it out, it holds anyway")
    for name, record in document.records.items():
        for kept in floor.records.values():
            if period_days(record.retain) < period_days(kept.retain):
                yield Finding(f"records.{name}.retain", f"is shorter than the floor's {kept.retain}")
            if period_days(record.hot) < period_days(kept.hot):
                yield Finding(f"records.{name}.hot", f"is shorter than the floor's {kept.hot}")
    floors = {purpose.id: set(purpose.data_classes) for purpose in floor.purposes}
    for position, purpose in enumerate(document.purposes):
        for missing in sorted(floors.get(purpose.id, set()) - set(purpose.data_classes)):
            yield Finding(f"purposes[{position}].data_classes", f"leaves out `{missing}`, which the floor gives it")


def _more_params(params: Params, own: Params, path: str) -> Iterator[Finding]:
    for member in ("max_output_tokens", "temperature", "top_p", "n"):
        mine, floors = getattr(params, member), getattr(own, member)
        if mine is not None and floors is not None and mine.max > floors.max:
            yield Finding(f"{path}.{member}.max", f"is above the floor's {floors.max}")


def _more_buckets(buckets: Buckets, bound: Buckets, path: str) -> Iterator[Finding]:
    for kind in LimitKind:
        mine, floors = getattr(buckets, kind.value), getattr(bound, kind.value)
        if mine is not None and floors is not None and mine > floors:
            yield Finding(f"{path}.{kind.value}", f"is above the floor's {floors}")


def check_floor(floor: PolicyDocument) -> None:
    """Raise PolicyInvalid unless the document can be a floor: it forbids and obliges, it allows nothing by itself."""
    findings = [
        Finding(f"rules[{position}].effect", "a floor's rules are denies")
        for position, rule in enumerate(floor.rules)
        if rule.effect == "allow"
    ]
    if floor.tenant != FLOOR_TENANT:
        findings.append(Finding("tenant", f"a floor is the policy of tenant `{FLOOR_TENANT}`"))
    if floor.models:
        findings.append(Finding("models", "models are approved for tenants, not in the floor"))
    if floor.extends is not None:
        findings.append(Finding("extends", "a floor extends nothing"))
    if findings:
        raise PolicyInvalid(findings)


def period_days(period: str) -> int:
    """Return the days of `P90D`, `P6M` (30 days a month) or `P7Y` (365 a year)."""
    return int(period[1:-1]) * {"D": 1, "M": 30, "Y": 365}[period[-1]]


def clock_time(text: str) -> time:
    return time.fromisoformat(text)
