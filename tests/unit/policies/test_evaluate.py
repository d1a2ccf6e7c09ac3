"""Deciding: the semantics of policy.md, each named by a test."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from policies.decision import Action, Adjustment, DeniedBy, Effect, LimitKind, LimitSpec, Obligations, Scope
from policies.document import EffectivePolicy
from policies.evaluate import evaluate
from policies.request import AccessRequest
from tests.support.policies import (
    LOADED,
    OTHER_VERSION,
    VERSION,
    allow,
    deny,
    floor_value,
    policy,
    request,
)


def denied(asked: AccessRequest, by: EffectivePolicy, loaded: frozenset[str] = LOADED) -> tuple[DeniedBy | None, str]:
    decision = evaluate(asked, by, loaded)
    assert decision.effect is Effect.DENY
    assert decision.obligations is None
    assert decision.policy == by.digest
    return decision.denied_by, decision.reasons[0].code


def obliged(asked: AccessRequest, by: EffectivePolicy) -> Obligations:
    decision = evaluate(asked, by, LOADED)
    assert decision.effect is Effect.ALLOW, decision.reasons
    assert decision.denied_by is None
    assert decision.policy == by.digest
    assert decision.obligations is not None
    return decision.obligations


def test_an_allow_names_its_rules_and_the_approved_version() -> None:
    decision = evaluate(request(), policy(), LOADED)
    assert [reason.rule for reason in decision.reasons] == ["everybody"]
    model = obliged(request(), policy()).model
    assert (model.alias, model.version, model.approval) == ("chat", VERSION, "A-1")


# 1. Default deny, deny overrides, errors deny.


def test_without_rules_everything_is_denied() -> None:
    assert denied(request(), policy(rules=[])) == (DeniedBy.RULE, "default_deny")


@pytest.mark.parametrize("order", [1, -1])
def test_a_deny_overrides_wherever_it_stands(order: int) -> None:
    rules = [allow(), deny("no-contractors", "contractor_customer_data", roles_any=["contractor"])][::order]
    assert denied(request(roles=("app", "contractor")), policy(rules=rules)) == (
        DeniedBy.RULE,
        "contractor_customer_data",
    )


def test_every_deny_that_matches_is_a_reason() -> None:
    decision = evaluate(request(), policy(rules=[allow(), deny("a"), deny("b")]), LOADED)
    assert [reason.rule for reason in decision.reasons] == ["a", "b"]


def test_a_deny_without_conditions_denies_everything() -> None:
    assert denied(request(), policy(rules=[allow(), deny()]))[0] is DeniedBy.RULE


@pytest.mark.parametrize(
    "asked",
    [
        request(source="not an address"),
        request(temperature="NaN"),
        request(at=datetime(2026, 11, 20, 12, 0)),
        request(at=datetime(2026, 11, 20, 12, 0, tzinfo=timezone(timedelta(hours=2)))),
        replace(request(), principal=None),  # type: ignore[arg-type]
    ],
)
def test_an_error_inside_is_a_deny_that_says_so(asked: AccessRequest) -> None:
    by = policy(rules=[allow(with_={"params": "p"}), deny(source_cidrs=["10.0.0.0/8"], roles_any=["contractor"]),
                       allow("near", source_cidrs=["10.0.0.0/8"])],
                params={"p": {"temperature": {"max": "1"}}})  # fmt: skip
    decision = evaluate(asked, by, LOADED)
    assert (decision.effect, decision.denied_by, decision.reasons[0].code) == (Effect.DENY, DeniedBy.ERROR, "error")
    assert "not an address" not in str(decision)


def test_another_tenants_request_is_denied() -> None:
    assert denied(request(tenant="globex"), policy()) == (DeniedBy.RULE, "other_tenant")


# 2. A missing attribute never satisfies a condition.


@pytest.mark.parametrize(
    ("missing", "when"),
    [
        ({"client": None}, {"clients_any": ["svc"]}),
        ({"purpose": None}, {"purposes_any": ["support"]}),
        ({"purpose": None}, {"data_classes_any": ["pii"]}),
        ({"purpose": "unheard-of"}, {"data_classes_any": ["pii"]}),
        ({"source": None}, {"source_cidrs": ["0.0.0.0/0"]}),
        ({"roles": ()}, {"roles_any": ["app"]}),
    ],
)
def test_a_missing_attribute_satisfies_no_condition(missing: dict[str, Any], when: dict[str, Any]) -> None:
    both = policy(rules=[allow(**when)])
    assert evaluate(request(), both, LOADED).effect is Effect.ALLOW
    assert evaluate(request(**missing), both, LOADED).effect is Effect.DENY
    if "roles" not in missing:
        assert evaluate(request(**missing), policy(rules=[allow(), deny(**when)]), LOADED).effect is Effect.ALLOW


# 3. Several allows combine to the strictest.

SECTIONS: dict[str, Any] = {
    "limits": {
        "a": {"per_subject": {"requests_per_minute": 5}, "per_tenant": {"concurrency": 9}},
        "b": {"per_subject": {"requests_per_minute": 7, "concurrency": 2}, "per_tenant": {"concurrency": 4}},
    },
    "guardrails": {
        "in-a": {"detector": "pii", "stage": "input", "action": "redact", "entities": ["ssn", "card"]},
        "in-b": {"detector": "secrets", "stage": "input", "action": "block"},
    },
    "params": {
        "a": {"max_output_tokens": {"max": 100, "default": 50}, "temperature": {"max": "0.7"}, "on_excess": "clamp"},
        "b": {"max_output_tokens": {"max": 60}, "n": {"max": 2}, "on_excess": "clamp"},
        "hard": {"max_output_tokens": {"max": 200}, "n": {"max": 4}},
    },
    "records": {
        "a": {"content": "encrypted", "retain": "P7Y", "hot": "P1Y"},
        "b": {"content": "encrypted", "retain": "P10Y", "hot": "P90D"},
    },
}
BOTH = [
    allow("a", with_={"limits": "a", "guardrails": ["in-a"], "params": "a", "record": "a"}),
    allow("b", with_={"limits": "b", "guardrails": ["in-b"], "params": "b", "record": "b"}),
]


def test_several_allows_combine_to_the_strictest() -> None:
    given = obliged(request(max_tokens=90, temperature="1", n=2), policy(rules=BOTH, **SECTIONS))
    assert [guardrail.id for guardrail in given.guardrails] == ["in-a", "in-b"]
    assert given.guardrails[0].entities == ("card", "ssn")
    assert given.guardrails[1].action is Action.BLOCK
    assert set(given.limits) == {
        LimitSpec("a", Scope.SUBJECT, LimitKind.REQUESTS_PER_MINUTE, 5),
        LimitSpec("b", Scope.SUBJECT, LimitKind.CONCURRENCY, 2),
        LimitSpec("b", Scope.TENANT, LimitKind.CONCURRENCY, 4),
    }
    assert given.record is not None
    assert (given.record.id, given.record.retain_days, given.record.hot_days) == ("b", 3650, 365)
    assert (given.params.max_tokens, str(given.params.temperature), given.params.n) == (60, "0.7", 2)
    assert given.adjustments == (Adjustment("max_tokens", "90", "60"), Adjustment("temperature", "1", "0.7"))


def test_what_was_left_open_gets_the_default_and_no_adjustment() -> None:
    given = obliged(request(), policy(rules=BOTH, **SECTIONS))
    assert (given.params.max_tokens, str(given.params.temperature), str(given.params.top_p)) == (50, "0.7", "1")
    assert given.adjustments == ()


def test_a_bound_that_rejects_is_not_softened_by_one_that_clamps() -> None:
    by = policy(rules=[*BOTH, allow("hard", with_={"params": "hard"})], **SECTIONS)
    over = evaluate(request(max_tokens=201), by, LOADED)
    assert (over.denied_by, over.reasons[0].code, over.reasons[0].detail) == (
        DeniedBy.PARAMETER,
        "parameter_exceeds",
        "max_tokens",
    )
    assert evaluate(request(n=5), by, LOADED).reasons[0].detail == "n"
    assert obliged(request(max_tokens=200), by).params.max_tokens == 60


def test_the_floor_obliges_although_no_rule_names_it() -> None:
    floor = floor_value(
        **{name: {"org": section["a"]} for name, section in SECTIONS.items() if name != "guardrails"},
        guardrails={"org-in": {"detector": "secrets", "stage": "input", "action": "block"}},
    )
    given = obliged(request(), policy(floor))
    assert [guardrail.id for guardrail in given.guardrails] == ["org-in"]
    assert {limit.id for limit in given.limits} == {"org"}
    assert given.record is not None
    assert given.record.id == "org"
    assert given.params.max_tokens == 50


def test_the_floor_denies_by_data_classes_that_it_gives_a_purpose() -> None:
    floor = floor_value(
        purposes=[{"id": "code", "data_classes": ["source-text"]}],
        rules=[deny("org-deny", data_classes_any=["source-text"], roles_any=["app"])],
    )
    by = policy(floor, purposes=[{"id": "code", "data_classes": ["internal", "source-text"]}])
    assert denied(request(purpose="code"), by)[0] is DeniedBy.RULE


# 4. Purpose is bound to the client in the rule.


def test_a_purpose_counts_only_from_the_client_it_is_bound_to() -> None:
    by = policy(rules=[allow(clients_any=["svc-crm"], purposes_any=["support"])])
    assert evaluate(request(client="svc-crm"), by, LOADED).effect is Effect.ALLOW
    assert denied(request(client="svc-code"), by) == (DeniedBy.RULE, "default_deny")
    assert denied(request(client="svc-crm", purpose="code"), by) == (DeniedBy.RULE, "default_deny")


# 5. Unknown, disallowed, unapproved and unloaded models are one kind of denial.


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [
        (request(model="unknown"), LOADED),
        (request(model="other"), LOADED),  # defined, but no rule allows it
        (request(), frozenset({OTHER_VERSION})),
        (request(), frozenset()),
        (request(at=datetime(2027, 2, 1, tzinfo=UTC)), LOADED),
    ],
)
def test_unknown_disallowed_expired_and_unloaded_models_are_denied_alike(
    asked: AccessRequest, loaded: frozenset[str]
) -> None:
    entry = {"version": VERSION, "approval": "A-1", "expires": "2027-01-31"}
    by, reason = denied(asked, policy(models={"chat": entry, "other": entry}), loaded)
    assert by is DeniedBy.MODEL
    assert reason.startswith("model_")


def test_an_approval_holds_to_the_end_of_its_day() -> None:
    last = datetime(2027, 1, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert evaluate(request(at=last), policy(), LOADED).effect is Effect.ALLOW
    assert denied(request(at=last + timedelta(microseconds=1)), policy())[1] == "model_approval_expired"


def test_who_may_nothing_learns_nothing_about_models() -> None:
    assert denied(request(roles=("auditor",), model="unknown"), policy())[0] is DeniedBy.RULE
    assert denied(request(roles=("auditor",)), policy())[0] is DeniedBy.RULE


# Conditions.


@pytest.mark.parametrize(
    ("at", "open_"),
    [
        ("2026-11-20T05:59:59", False),
        ("2026-11-20T06:00:00", True),
        ("2026-11-20T19:59:59", True),
        ("2026-11-20T20:00:00", False),
        ("2026-11-21T12:00:00", False),  # a Saturday
    ],
)
def test_hours_include_their_start_and_not_their_end(at: str, open_: bool) -> None:
    by = policy(rules=[allow(hours_utc={"days": ["fri"], "start": "06:00", "end": "20:00"})])
    moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
    assert (evaluate(request(at=moment), by, LOADED).effect is Effect.ALLOW) is open_


@pytest.mark.parametrize(
    ("at", "open_"),
    [
        ("2026-11-20T23:00:00", True),
        ("2026-11-21T03:00:00", True),
        ("2026-11-20T03:00:00", False),
        ("2026-11-21T23:00:00", False),
    ],
)
def test_hours_past_midnight_belong_to_the_day_they_began(at: str, open_: bool) -> None:
    by = policy(rules=[allow(hours_utc={"days": ["fri"], "start": "22:00", "end": "04:00"})])
    moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
    assert (evaluate(request(at=moment), by, LOADED).effect is Effect.ALLOW) is open_


@pytest.mark.parametrize(
    ("source", "inside"),
    [("10.20.0.0", True), ("10.21.0.0", False), ("::ffff:10.20.1.1", True), ("2001:db8::1", True), ("::1", False)],
)
def test_source_is_matched_by_network_in_both_families(source: str, inside: bool) -> None:
    by = policy(rules=[allow(source_cidrs=["10.20.0.0/16", "2001:db8::/32"])])
    assert (evaluate(request(source=source), by, LOADED).effect is Effect.ALLOW) is inside


# 12. A request keeps the policy it started with; its digest is in the decision.


def test_two_policies_of_one_tenant_decide_side_by_side() -> None:
    old, new = policy(), policy(rules=[])
    assert evaluate(request(), old, LOADED).effect is Effect.ALLOW
    assert denied(request(), new)[0] is DeniedBy.RULE
    assert evaluate(request(), old, LOADED).policy == old.digest != new.digest
