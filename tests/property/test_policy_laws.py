"""The compiled evaluator agrees with the naive one, on documents and requests that collide as often as they can."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.decision import Decision, DeniedBy, Effect
from policies.document import compose, parse_policy, read_document
from policies.evaluate import evaluate
from policies.request import AccessRequest
from tests.support.naive_policy import evaluate_naive
from tests.support.policies import LOADED, OTHER_VERSION, VERSION, document_value, floor_value, request

ROLES = ["app", "contractor", "intern"]
CLIENTS = ["svc", "svc-crm"]
PURPOSES = ["support", "code"]
CLASSES = ["pii", "internal", "none"]
MODELS = ["chat", "expired", "absent"]
CIDRS = ["10.20.0.0/16", "10.20.3.4", "2001:db8::/32", "0.0.0.0/0"]
CLOCKS = ["00:00", "06:00", "11:59", "12:00", "20:00", "23:59"]
DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def some(values: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True)


@st.composite
def hours(draw: st.DrawFn) -> dict[str, Any]:
    start, end = draw(st.permutations(CLOCKS))[:2]
    return {"days": draw(some(DAYS)), "start": start, "end": end}


CONDITIONS: dict[str, st.SearchStrategy[Any]] = {
    "roles_any": some(ROLES),
    "clients_any": some(CLIENTS),
    "actions_any": some(["chat.completions", "completions"]),
    "purposes_any": some(PURPOSES),
    "models_any": some(MODELS),
    "data_classes_any": some(CLASSES),
    "source_cidrs": some(CIDRS),
    "hours_utc": hours(),
}
OBLIGATIONS = {
    "limits": st.sampled_from(["small", "wide"]),
    "guardrails": some(["pii-in", "secrets-in"]),
    "params": st.sampled_from(["strict", "soft"]),
    "record": st.sampled_from(["short", "long"]),
}
SECTIONS: dict[str, Any] = {
    "models": {
        name: {"version": version, "approval": "A", "expires": expires}
        for name, version, expires in (
            ("chat", VERSION, "2026-11-21"),
            ("expired", VERSION, "2026-11-19"),
            ("absent", OTHER_VERSION, "2030-01-01"),
        )
    },
    "limits": {
        "small": {"per_subject": {"requests_per_minute": 3}, "per_tenant": {"concurrency": 9, "tokens_per_day": 70}},
        "wide": {"per_subject": {"requests_per_minute": 30, "concurrency": 2}, "per_tenant": {"tokens_per_day": 80}},
    },
    "guardrails": {
        "pii-in": {"detector": "pii", "stage": "input", "action": "redact"},
        "secrets-in": {"detector": "secrets", "stage": "input", "action": "block"},
    },
    "params": {
        "strict": {"max_output_tokens": {"max": 100, "default": 40}, "temperature": {"max": "0.7"}},
        "soft": {"max_output_tokens": {"max": 60}, "n": {"max": 2}, "top_p": {"max": "0.9"}, "on_excess": "clamp"},
    },
    "records": {
        "short": {"content": "encrypted", "retain": "P7Y", "hot": "P1Y"},
        "long": {"content": "encrypted", "retain": "P10Y", "hot": "P100D"},
    },
}
FLOORS: list[dict[str, Any] | None] = [
    None,
    floor_value(
        purposes=[{"id": "support", "data_classes": ["pii"]}],
        rules=[{"id": "no-interns", "effect": "deny", "when": {"roles_any": ["intern"], "data_classes_any": ["pii"]}}],
        limits={"org": {"per_tenant": {"concurrency": 10, "tokens_per_day": 80}}},
        params={"org": {"max_output_tokens": {"max": 120, "default": 50}, "n": {"max": 3}}},
        guardrails={"org-in": {"detector": "secrets", "stage": "input", "action": "flag"}},
        records={"org": {"content": "encrypted", "retain": "P6Y", "hot": "P90D"}},
    ),
]


@st.composite
def rules(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for position in range(draw(st.integers(0, 5))):
        when = draw(st.fixed_dictionaries({}, optional=CONDITIONS))
        rule: dict[str, Any] = {"id": f"rule-{position}", "effect": "deny", "when": when}
        if draw(st.booleans()):
            when.setdefault("roles_any", ["app"])
            when.setdefault("models_any", ["chat"])
            rule |= {"effect": "allow", "with": draw(st.fixed_dictionaries({}, optional=OBLIGATIONS))}
        made.append(rule)
    return made


requests = st.builds(
    request,
    roles=st.lists(st.sampled_from(ROLES), max_size=2).map(tuple),
    client=st.sampled_from([None, *CLIENTS, "other"]),
    action=st.sampled_from(["chat.completions", "completions", "embeddings"]),
    model=st.sampled_from([*MODELS, "unknown"]),
    purpose=st.sampled_from([None, *PURPOSES, "unknown"]),
    source=st.sampled_from([None, "10.20.3.4", "10.21.0.1", "2001:db8::1", "2001:db9::1"]),
    at=st.integers(0, 7 * 24 * 60).map(lambda m: datetime(2026, 11, 17, tzinfo=UTC) + timedelta(minutes=m)),
    max_tokens=st.sampled_from([None, 1, 60, 61, 100, 101, 121]),
    temperature=st.sampled_from([None, "0", "0.70", "0.71", "2"]),
    top_p=st.sampled_from([None, "0.9", "1"]),
    n=st.integers(1, 4),
)


def told(decision: Decision) -> dict[str, Any]:
    """Return a decision in the naive evaluator's words."""
    denied_by = decision.denied_by.value if decision.denied_by is not None else None
    ids = [reason.rule for reason in decision.reasons if reason.rule is not None]
    value: dict[str, Any] = {"effect": decision.effect.value, "denied_by": denied_by, "rules": ids}
    given_ = decision.obligations
    if given_ is None:
        return value
    names = ("max_tokens", "temperature", "top_p", "n")
    record = given_.record
    return value | {
        "params": {name: getattr(given_.params, name) for name in names},
        "guardrails": [guardrail.id for guardrail in given_.guardrails],
        "limits": {(limit.scope.value, limit.kind.value): limit.maximum for limit in given_.limits},
        "kept": (None, None) if record is None else (record.retain_days, record.hot_days),
    }


@settings(max_examples=400)
@given(rules(), st.sampled_from(FLOORS), st.lists(requests, min_size=1, max_size=6))
def test_evaluate_agrees_with_the_naive_evaluator(
    made: list[dict[str, Any]], floor: dict[str, Any] | None, asked: list[AccessRequest]
) -> None:
    effective = compose(
        None if floor is None else read_document(floor), read_document(document_value(rules=made, **SECTIONS))
    )
    for one in asked:
        decision = evaluate(one, effective, LOADED)
        assert decision.denied_by is not DeniedBy.ERROR
        assert told(decision) == evaluate_naive(one, effective, LOADED)


@settings(max_examples=100)
@given(rules(), requests, st.randoms())
def test_order_of_rules_never_matters_to_the_effect(
    made: list[dict[str, Any]], asked: AccessRequest, any_: Any
) -> None:
    shuffled = list(made)
    any_.shuffle(shuffled)
    one, other = (compose(None, read_document(document_value(rules=r, **SECTIONS))) for r in (made, shuffled))
    first, second = evaluate(asked, one, LOADED), evaluate(asked, other, LOADED)
    assert (first.effect, first.denied_by, first.obligations) == (second.effect, second.denied_by, second.obligations)


@settings(max_examples=100)
@given(rules(), requests)
def test_an_added_deny_never_makes_an_allow(made: list[dict[str, Any]], asked: AccessRequest) -> None:
    more = [*made, {"id": "added", "effect": "deny", "when": {"roles_any": ["app"]}}]
    before, after = (
        evaluate(asked, compose(None, read_document(document_value(rules=r, **SECTIONS))), LOADED) for r in (made, more)
    )
    assert not (before.effect is Effect.DENY and after.effect is Effect.ALLOW)


@settings(max_examples=100)
@given(rules())
def test_a_document_reads_back_from_its_canonical_text(made: list[dict[str, Any]]) -> None:
    document = read_document(document_value(rules=made, **SECTIONS))
    again = parse_policy(document.canonical().decode())
    assert again == document
    assert again.canonical() == document.canonical()
