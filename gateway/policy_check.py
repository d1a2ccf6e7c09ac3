"""What an author asks before anybody else is asked: is this document a policy, and what would it decide?

A request to explain, complete; what is left out is absent:

    {"roles": ["app"], "client": "svc-crm", "purpose": "complaint-summary", "model": "bank-chat",
     "action": "chat.completions", "source": "10.20.3.4", "at": "2026-11-20T10:00:00Z",
     "params": {"max_tokens": 200, "temperature": "0.2", "n": 1}}

The models of the document count as loaded. Pure: texts in, values out.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.entries import decision_entry
from gateway.strict_json import MalformedJson, parse_json
from policies.decision import Obligations
from policies.document import EffectivePolicy, Finding, PolicyDocument, PolicyInvalid, compose, parse_policy, warnings
from policies.evaluate import evaluate
from policies.request import AccessRequest, Principal, RequestedParams

# CheckRefused    the only error: the document, the floor or the request is refused; `findings` says where and why


class CheckRefused(ValueError):
    """Something of what was given is refused."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("; ".join(findings))
        self.findings = findings


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid")

    max_tokens: int | None = None
    temperature: Decimal | None = None
    top_p: Decimal | None = None
    n: Annotated[int, Field(ge=1)] = 1


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    roles: list[str]
    model: str
    action: str = "chat.completions"
    subject: str = "someone"
    client: str | None = None
    purpose: str | None = None
    source: str | None = None
    at: datetime | None = None
    params: _Params = _Params()


def check_policy(text: str, floor_text: str | None, today: date | None = None) -> tuple[EffectivePolicy, list[Finding]]:
    """Return the policy as it would hold, and what is allowed but probably not meant. Raises: CheckRefused."""
    floor = None if floor_text is None else _parsed(floor_text, "floor: ")
    document = _parsed(text, "")
    if floor is None:
        document = document.model_copy(update={"extends": None})  # nothing to be checked against
    try:
        effective = compose(floor, document)
    except PolicyInvalid as invalid:
        raise CheckRefused([str(finding) for finding in invalid.findings]) from None
    return effective, warnings(document, today or datetime.now(UTC).date())


def explain_request(policy: EffectivePolicy, text: str) -> dict[str, Any]:
    """Return the decision on a request, with its reasons and what it would oblige to. Raises: CheckRefused."""
    asked = _request(text)
    request = AccessRequest(
        principal=Principal(
            "explain", asked.subject, policy.tenant, frozenset(asked.roles), asked.client, asked.purpose
        ),
        action=asked.action,
        model=asked.model,
        purpose=asked.purpose,
        source=asked.source,
        at=(asked.at or datetime.now(UTC)).astimezone(UTC),
        params=RequestedParams(asked.params.max_tokens, asked.params.temperature, asked.params.top_p, asked.params.n),
    )
    loaded = frozenset(model.version for model in policy.models.values())
    decision = evaluate(request, policy, loaded)
    entry = decision_entry(decision)
    obliges = None if decision.obligations is None else obliged(decision.obligations)
    return {
        "effect": entry.effect,
        "reasons": [dict(reason) for reason in entry.reasons],
        "policy": entry.policy,
        "obligations": obliges,
    }


def _parsed(text: str, prefix: str) -> PolicyDocument:
    try:
        return parse_policy(text)
    except PolicyInvalid as invalid:
        raise CheckRefused([f"{prefix}{finding}" for finding in invalid.findings]) from None


def _request(text: str) -> _Request:
    try:
        return _Request.model_validate(parse_json(text.encode()))
    except MalformedJson as error:
        raise CheckRefused([f"request: not usable JSON: {error}"]) from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise CheckRefused(
            [f"request: `{'.'.join(map(str, one['loc']))}`: {one['msg'].lower()}" for one in found]
        ) from None


def obliged(obligations: Obligations) -> dict[str, Any]:
    """Return what an allow obliges to, as it is shown."""
    params = obligations.params
    return {
        "model": {"alias": obligations.model.alias, "version": obligations.model.version},
        "params": {
            "max_tokens": params.max_tokens,
            "temperature": str(params.temperature),
            "top_p": str(params.top_p),
            "n": params.n,
        },
        "adjusted": [{"param": a.param, "old": a.old, "new": a.new} for a in obligations.adjustments],
        "guardrails": [guardrail.id for guardrail in obligations.guardrails],
        "limits": [
            {"id": limit.id, "scope": limit.scope.value, "kind": limit.kind.value, "maximum": limit.maximum}
            for limit in obligations.limits
        ],
        "record": None if obligations.record is None else obligations.record.id,
    }
