"""The document: one meaning, every finding with its path, and no way for a tenant to loosen the floor."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from policies.document import (
    MAX_DOCUMENT_BYTES,
    MAX_FINDINGS,
    PolicyInvalid,
    check_floor,
    compose,
    parse_policy,
    period_days,
    read_document,
    read_submitted,
    warnings,
)
from policies.guardrails.detectors import longest_span
from tests.support.policies import allow, deny, document, document_value, floor_value

MODEL = {"version": "sha256:" + "a" * 64, "approval": "A", "expires": "2027-01-01"}
HEAD = "api_version: policy/v1\ntenant: acme\nname: n\ndefault: deny\n"


def findings(**members: Any) -> dict[str, str]:
    with pytest.raises(PolicyInvalid) as refused:
        document(**members)
    return {finding.path: finding.message for finding in refused.value.findings}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (HEAD + "purposes: &a []\n", "line 5", "anchors"),
        (HEAD + "purposes: *a\n", "line 5", "aliases"),
        (HEAD + "purposes: !!set {}\n", "line 5", "tags"),
        (HEAD + "purposes: ! []\n", "line 5", "tags"),
        (HEAD + "name: m\n", "line 5", "twice"),
        (HEAD + "models: {1: {}}\n", "line 5", "must be a text"),
        (HEAD + "rules: " + "[" * 40 + "]" * 40, "line 5", "nested deeper"),
        (HEAD + "rules: [\n", "line 6", "not well-formed"),
        (HEAD + "---\n" + HEAD, "line 5", "not well-formed"),
        (HEAD + "rules: [\x00]\n", "document", "not well-formed"),
        (HEAD + 'name2: "\\ud800"\n', "document", ""),
        (HEAD + "limits: {l: {per_subject: {concurrency: " + "9" * 5_000 + "}}}\n", "document", "not well-formed"),
        ("#" * MAX_DOCUMENT_BYTES + "\n", "document", "longer than"),
        ("", "document", ""),
        ("[]", "document", ""),
    ],
)
def test_parse_refuses_what_has_more_than_one_meaning(text: str, where: str, what: str) -> None:
    with pytest.raises(PolicyInvalid) as refused:
        parse_policy(text)
    assert refused.value.findings[0].path == where
    assert what in refused.value.findings[0].message


def test_parse_reads_words_that_other_loaders_turn_into_values() -> None:
    read = parse_policy(
        HEAD + "models: {no: {version: sha256:" + "0" * 64 + ", approval: on, expires: 2027-04-30}}\n"
        "rules: [{id: r, effect: deny, when: {hours_utc: {days: [mon], start: 06:00, end: 20:00}}}]\n"
    )
    assert read.models["no"].approval == "on"
    assert read.models["no"].expires == "2027-04-30"
    assert read.rules[0].when.hours_utc is not None
    assert read.rules[0].when.hours_utc.start == "06:00"


@pytest.mark.parametrize(
    ("members", "path", "what"),
    [
        ({"unknown": 1}, "unknown", "extra"),
        ({"default": "allow"}, "default", "deny"),
        ({"api_version": "policy/v2"}, "api_version", "policy/v1"),
        ({"rules": [allow(), allow()]}, "rules[1].id", "another rule"),
        ({"rules": [allow(roles_any=None)]}, "rules[0].when", "who"),
        ({"rules": [allow(models_any=None)]}, "rules[0].when", "which model"),
        ({"rules": [allow(roles_any=[])]}, "rules[0].when.roles_any", "at least 1"),
        ({"rules": [deny() | {"with": {"params": "p"}}]}, "rules[0].with", "no obligations"),
        ({"rules": [deny() | {"with_": {"params": "p"}}]}, "rules[0].with_", "extra"),
        ({"rules": [allow(models_any=["gpt"])]}, "rules[0].when.models_any", "`gpt` is not defined"),
        ({"rules": [allow(purposes_any=["x"])]}, "rules[0].when.purposes_any", "`x` is not defined"),
        ({"rules": [allow(with_={"guardrails": ["g"]})]}, "rules[0].with.guardrails", "`g` is not defined"),
        ({"rules": [allow(with_={"limits": "l"})]}, "rules[0].with.limits", "`l` is not defined"),
        ({"rules": [allow(with_={"params": "p"})]}, "rules[0].with.params", "`p` is not defined"),
        ({"rules": [allow(with_={"record": "r"})]}, "rules[0].with.record", "`r` is not defined"),
        ({"rules": [allow(actions_any=["chat"])]}, "rules[0].when.actions_any", "not an action"),
        ({"rules": [allow(source_cidrs=["10.0.0.1/8"])]}, "rules[0].when.source_cidrs[0]", "not a network"),
        (
            {"rules": [deny(hours_utc={"days": ["mon"], "start": "06:00", "end": "06:00"})]},
            "rules[0].when.hours_utc",
            "same",
        ),
        (
            {"rules": [deny(hours_utc={"days": ["mon"], "start": "6:00", "end": "07:00"})]},
            "rules[0].when.hours_utc.start",
            "pattern",
        ),
        ({"purposes": [{"id": "a"}, {"id": "a"}], "rules": []}, "purposes[1].id", "twice"),
        ({"models": {"chat": MODEL | {"version": "loaded"}}}, "models.chat.version", "pattern"),
        ({"models": {"chat": MODEL | {"expires": "2027-02-30"}}}, "models.chat.expires", "not a date"),
        ({"params": {"p": {"temperature": {"max": 0.7}}}}, "params.p.temperature.max", "in quotes"),
        ({"params": {"p": {"temperature": {"max": "1e-999999999"}}}}, "params.p.temperature.max", "in quotes"),
        ({"params": {"p": {"temperature": {"max": "NaN"}}}}, "params.p.temperature.max", "in quotes"),
        ({"params": {"p": {"temperature": {"max": "-1"}}}}, "params.p.temperature.max", "in quotes"),
        ({"params": {"p": {"temperature": {"max": "2.1"}}}}, "params.p.temperature.max", "less than or equal to 2"),
        ({"params": {"p": {"top_p": {"max": "0"}}}}, "params.p.top_p.max", "greater than 0"),
        ({"params": {"p": {"n": {"max": True}}}}, "params.p.n.max", "valid integer"),
        (
            {"params": {"p": {"max_output_tokens": {"max": 10, "default": 11}}}},
            "params.p.max_output_tokens.default",
            "above",
        ),
        ({"limits": {"l": {"per_subject": {"concurrency": 0}}}}, "limits.l.per_subject.concurrency", "greater"),
        ({"records": {"r": {"content": "clear", "retain": "P1Y", "hot": "P1D"}}}, "records.r.content", "encrypted"),
        ({"records": {"r": {"content": "encrypted", "retain": "P1Y", "hot": "P366D"}}}, "records.r.hot", "longer than"),
        ({"controls": {"audit_unavailable": "allow"}}, "controls.audit_unavailable", "deny"),
    ],
)
def test_each_offence_is_found_at_its_path(members: dict[str, Any], path: str, what: str) -> None:
    assert what in findings(**members)[path].lower() or what in findings(**members)[path]


def test_what_somebody_sends_is_bounded_as_text_and_as_json_and_so_is_what_is_found_in_it() -> None:
    long = document_value(purposes=[{"id": f"p{number}"} for number in range(20_000)])
    with pytest.raises(PolicyInvalid, match="longer than"):
        read_submitted(long)
    with pytest.raises(PolicyInvalid, match="longer than"):
        read_submitted(HEAD + "#" * MAX_DOCUMENT_BYTES)
    assert read_submitted(document_value()) == read_document(document_value())
    for wrong in ([{"id": f"r{number}"} for number in range(500)], [deny("same")] * 500):
        with pytest.raises(PolicyInvalid) as refused:
            read_submitted(document_value(rules=wrong))
        assert len(refused.value.findings) == MAX_FINDINGS


@pytest.mark.parametrize("rule", [allow, deny])
def test_rules_whose_reasons_have_no_room_on_record_are_refused_by_name(rule: Any) -> None:
    """About 700 allows that matched one request made its record too large to be one: a 500, off record."""
    effect = rule("r")["effect"]
    rules = [rule(f"number-{number:03}") for number in range(700)]
    assert f"all {effect} rules" in findings(rules=rules)["rules"]
    assert len(read_document(document_value(rules=rules[:500])).rules) == 500


def test_guardrails_are_bounded_by_name() -> None:
    found = {f"g{number:03}": {"detector": "pii", "stage": "input", "action": "flag"} for number in range(90)}
    assert "verdicts of all of them" in findings(guardrails=found)["guardrails"]


def test_the_work_of_reading_grows_with_the_length_and_not_with_its_square() -> None:
    """With a comparison for each pair of names these would be 1,800 million, and the test would not end."""
    names = [f"a{number}" for number in range(60_000)]
    assert len(read_document(document_value(purposes=[{"id": name} for name in names])).purposes) == len(names)
    with pytest.raises(PolicyInvalid) as refused:
        parse_policy("".join(f"{name}:\n" for name in names[:30_000]))
    assert len(refused.value.findings) == MAX_FINDINGS


def test_all_offences_are_found_at_once() -> None:
    rules = [allow(models_any=["gpt"]), allow("b", purposes_any=["x"], with_={"params": "p"})]
    assert set(findings(rules=rules)) == {
        "rules[0].when.models_any",
        "rules[1].when.purposes_any",
        "rules[1].with.params",
    }


def guardrail(**members: Any) -> dict[str, Any]:
    value = {"detector": "pii", "stage": "output", "action": "redact", "entities": ["card"]}
    return {"guardrails": {"g": value | members}}


@pytest.mark.parametrize(
    ("members", "path", "what"),
    [
        (guardrail(), "guardrails.g.streaming", "`window` or `hold_all`"),
        (guardrail(detector="magic"), "guardrails.g.detector", "`magic` is not a detector"),
        (guardrail(entities=["jwt"], streaming={"mode": "hold_all"}), "guardrails.g.entities", "`jwt`"),
        (guardrail(stage="input", streaming={"mode": "hold_all"}), "guardrails.g.streaming", "does not stream"),
        (guardrail(stage="input", on_error="allow"), "guardrails.g.on_error", "block"),
        (guardrail(stage="input", action="pseudonymise"), "guardrails.g.action", "not supported yet"),
        (guardrail(streaming={"mode": "window"}), "guardrails.g.streaming.hold_chars", "at least"),
    ],
)
def test_guardrails_are_checked(members: dict[str, Any], path: str, what: str) -> None:
    assert what in findings(**members)[path]


@pytest.mark.parametrize("entities", [["card"], ["iban", "ssn"], ["email"], []])
def test_hold_chars_below_the_longest_span_are_an_error(entities: list[str]) -> None:
    needed = longest_span("pii", tuple(entities))
    assert needed is not None
    short = guardrail(entities=entities, streaming={"mode": "window", "hold_chars": needed - 1})
    assert str(needed) in findings(**short)["guardrails.g.streaming.hold_chars"]
    document(**guardrail(entities=entities, streaming={"mode": "window", "hold_chars": needed}))


def test_a_flag_needs_no_streaming_mode() -> None:
    document(**guardrail(action="flag"))


def test_warnings_name_rules_that_never_match_and_approvals_that_expired() -> None:
    rules = [
        deny("a", data_classes_any=["secret"]),
        deny("b", purposes_any=["code"], data_classes_any=["pii"]),
        deny("c", purposes_any=["support"], data_classes_any=["pii"]),
    ]
    found = warnings(document(rules=rules), date(2027, 2, 1))
    assert [finding.path for finding in found] == [
        "rules[0].when.data_classes_any",
        "rules[1].when.data_classes_any",
        "models.chat.expires",
    ]
    assert warnings(document(), date(2027, 1, 31)) == []


def test_identity_does_not_depend_on_how_the_document_was_written() -> None:
    value = document_value(params={"p": {"temperature": {"max": "0.70"}}})
    again = document_value(params={"p": {"temperature": {"max": "0.7"}, "on_excess": "reject"}})
    again["models"] = dict(reversed(again["models"].items()))
    assert read_document(value).canonical() == read_document(again).canonical()


def test_digest_is_of_the_effective_document() -> None:
    floor = read_document(floor_value(rules=[deny(roles_any=["intern"])]))
    other = read_document(floor_value(rules=[deny(roles_any=["temp"])]))
    digests = {compose(above, document()).digest for above in (None, floor, other)}
    assert len(digests) == 3
    assert all(len(digest) == 71 and digest.startswith("sha256:") for digest in digests)


FLOOR = floor_value(
    purposes=[{"id": "support", "data_classes": ["pii"]}],
    rules=[deny("no-temps", data_classes_any=["pii"], roles_any=["temp"])],
    params={
        "p": {
            "max_output_tokens": {"max": 100},
            "temperature": {"max": "0.7"},
            "top_p": {"max": "0.9"},
            "n": {"max": 2},
        }
    },
    limits={"l": {"per_tenant": {"tokens_per_day": 1000}, "per_subject": {"concurrency": 2}}},
    guardrails={"g": {"detector": "secrets", "stage": "input", "action": "block"}},
    records={"r": {"content": "encrypted", "retain": "P6Y", "hot": "P90D"}},
)
TIGHTER: dict[str, Any] = {
    "params": {"own": {"max_output_tokens": {"max": 100}, "temperature": {"max": "0.7"}, "n": {"max": 1}}},
    "limits": {"own": {"per_tenant": {"tokens_per_day": 1000}, "per_subject": {"concurrency": 1}}},
    "guardrails": {"g": {"detector": "secrets", "stage": "input", "action": "block"}},
    "records": {"own": {"content": "encrypted", "retain": "P7Y", "hot": "P90D"}},
}


def test_a_tenant_may_tighten() -> None:
    compose(read_document(FLOOR), document(extends="floor", **TIGHTER))


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"params": {"own": {"max_output_tokens": {"max": 101}}}}, "params.own.max_output_tokens.max"),
        ({"params": {"own": {"temperature": {"max": "0.71"}}}}, "params.own.temperature.max"),
        ({"params": {"own": {"top_p": {"max": "1"}}}}, "params.own.top_p.max"),
        ({"params": {"own": {"n": {"max": 3}}}}, "params.own.n.max"),
        ({"limits": {"own": {"per_tenant": {"tokens_per_day": 1001}}}}, "limits.own.per_tenant.tokens_per_day"),
        ({"limits": {"own": {"per_subject": {"concurrency": 3}}}}, "limits.own.per_subject.concurrency"),
        ({"guardrails": {"g": {"detector": "secrets", "stage": "input", "action": "flag"}}}, "guardrails.g"),
        ({"records": {"own": {"content": "encrypted", "retain": "P5Y", "hot": "P90D"}}}, "records.own.retain"),
        ({"records": {"own": {"content": "encrypted", "retain": "P7Y", "hot": "P89D"}}}, "records.own.hot"),
        ({"purposes": [{"id": "support", "data_classes": []}]}, "purposes[0].data_classes"),
        ({"extends": "other-floor"}, "extends"),
    ],
)
def test_each_way_of_loosening_is_refused_at_its_path(members: dict[str, Any], path: str) -> None:
    with pytest.raises(PolicyInvalid) as refused:
        compose(read_document(FLOOR), document(**members))
    assert [finding.path for finding in refused.value.findings] == [path]


def test_extending_a_floor_that_is_not_there_is_refused() -> None:
    with pytest.raises(PolicyInvalid, match="no floor"):
        compose(None, document(extends="floor"))


@pytest.mark.parametrize(
    ("floor", "path"),
    [
        (document_value(), "rules[0].effect"),
        (document_value(rules=[]), "tenant"),
        (document_value(tenant="*", rules=[]), "models"),
        (floor_value(extends="higher"), "extends"),
    ],
)
def test_a_floor_only_forbids_and_obliges(floor: dict[str, Any], path: str) -> None:
    for attempt in (check_floor, lambda above: compose(above, document())):
        with pytest.raises(PolicyInvalid) as refused:
            attempt(read_document(floor))
        assert path in [finding.path for finding in refused.value.findings]


def test_a_floor_may_deny_models_that_only_tenants_define() -> None:
    check_floor(read_document(floor_value(rules=[deny(models_any=["old-model"])])))


@pytest.mark.parametrize(("period", "days"), [("P1D", 1), ("P6M", 180), ("P7Y", 2555)])
def test_periods_are_days(period: str, days: int) -> None:
    assert period_days(period) == days
