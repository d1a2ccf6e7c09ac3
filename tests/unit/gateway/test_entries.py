"""Translation between the rooms: nothing is lost, nothing of a person gets through, floats become one text."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import SamplingParams
from gateway.entries import decimal_text, decision_entry, principal_entry, sampling_body
from policies.decision import (
    Adjustment,
    Decision,
    DeniedBy,
    GrantedParams,
    ModelGrant,
    Obligations,
    Reason,
)
from policies.request import Principal


@given(st.floats(min_value=0, max_value=2))
def test_a_decimal_reads_back_as_the_same_float_and_has_no_exponent(value: float) -> None:
    text = decimal_text(value)
    assert float(text) == value
    assert "e" not in text.lower()


@pytest.mark.parametrize(("value", "text"), [(0.7, "0.7"), (1.0, "1"), (0.0, "0"), (1e-7, "0.0000001")])
def test_decimals_have_one_text(value: float, text: str) -> None:
    assert decimal_text(value) == text


def test_the_subject_does_not_stand_in_the_principal_of_a_leaf() -> None:
    principal = Principal("https://id", "mia@acme.example", "acme", frozenset({"b", "app"}), "svc", "support")
    entry = principal_entry(principal)
    assert entry.roles == ["app", "b"]
    assert "mia" not in repr(entry)


def test_reasons_keep_their_rule_and_their_detail() -> None:
    decision = Decision.deny(DeniedBy.RULE, "sha256:x", Reason("one", "rule-1"), Reason("two", detail="n"))
    assert decision_entry(decision).reasons == [{"code": "one", "rule": "rule-1"}, {"code": "two", "detail": "n"}]


def test_sampling_records_the_seed_as_text_and_what_the_policy_changed() -> None:
    sampling = SamplingParams(max_tokens=8, seed=2**63 - 1, temperature=0.7, stop=("secret stop",))
    obligations = Obligations(
        model=ModelGrant("m", "sha256:v", "A-1"),
        params=GrantedParams(8, Decimal("0.7"), Decimal(1), 2),
        adjustments=(Adjustment("temperature", "1.5", "0.7"),),
        guardrails=(),
        limits=(),
        record=None,
    )
    body = sampling_body(sampling, 2, obligations)
    assert body["seed"] == str(2**63 - 1)
    assert body["n"] == 2
    assert body["adjusted"] == [{"param": "temperature", "old": "1.5", "new": "0.7"}]
    assert "secret" not in repr(body)
    assert not {"presence_penalty", "logit_bias_count", "min_tokens"} & body.keys()
    bent = replace(sampling, presence_penalty=-0.5, logit_bias=((77_123, 2.0),), stop_tokens=(77_124,), min_tokens=4)
    body = sampling_body(bent, 1, obligations)
    assert (body["presence_penalty"], body["logit_bias_count"], body["stop_tokens_count"]) == ("-0.5", 1, 1)
    assert (body["min_tokens"], "frequency_penalty" in body) == (4, False)
    assert "7712" not in repr(body)  # a token id says which word it is
