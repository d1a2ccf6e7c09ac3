"""What an application asks of its own policy: the decision without the generation, and what is left of its limits.

`POST /v1/policy/explain` is governed like the request it is about: its prompt is on record, it counts as a request, and
an input guardrail looks at it. Its answer says what would be answered, at this moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse

from gateway import errors
from gateway.admission import parse_json
from gateway.auth.authentication import with_purpose
from gateway.auth.permissions import Permission, requires
from gateway.entries import decision_entry
from gateway.error_responses import invalid_fields
from gateway.openapi import reference
from gateway.pipeline import Explanation
from gateway.policy_check import obliged
from gateway.routes.inference import HandMade, question_of
from gateway.schemas.bodies import BODIES, InferenceRequest, read_value
from gateway.schemas.explanation import ExplainBody
from gateway.state import AppState, state_of
from policies.decision import LimitSpec
from policies.document import ACTIONS, EffectivePolicy
from policies.evaluate import evaluate
from policies.limits import Holder
from policies.request import AccessRequest, Principal, RequestedParams
from policies.store import StoreUnavailable

router = APIRouter(prefix="/v1", route_class=HandMade)


@router.post("/policy/explain", openapi_extra=reference(ExplainBody), dependencies=[requires(Permission.INFER)])
async def explain(request: Request) -> JSONResponse:
    """What would be decided on a request, and why; nothing is generated."""
    body = await request.body()
    action, asked = _asked(body)
    explained = await state_of(request).pipeline.explain(question_of(request, action, body, asked))
    headers = {"probity-receipt": explained.receipt, "probity-policy": explained.decision.policy}
    return JSONResponse(_shown(explained), headers=headers | {"cache-control": "no-store"})


def _asked(body: bytes) -> tuple[str, InferenceRequest]:
    kind: Any = ExplainBody
    try:
        stated = ExplainBody.model_validate(parse_json(body))
        kind = BODIES[stated.action]
        return stated.action, read_value(stated.action, stated.request)
    except ValidationError as invalid:
        raise invalid_fields(invalid, kind) from None


def _shown(explained: Explanation) -> dict[str, Any]:
    decision, refusal = explained.decision, explained.refusal
    entry = decision_entry(decision)
    granted = decision.obligations if refusal is None else None
    told = None if refusal is None else {"status": refusal.status, **orjson.loads(refusal.openai_body)["error"]}
    return {
        "object": "policy.explanation",
        "effect": "allow" if refusal is None else "deny",
        "reasons": [dict(reason) for reason in entry.reasons],
        "policy": entry.policy,
        "error": told,
        "obligations": None if granted is None else obliged(granted),
        "guardrails": [{"id": one.guardrail, "verdict": str(one.outcome)} for one in explained.verdicts],
        "prompt_tokens": explained.prompt_tokens,
    }


@router.get("/usage", dependencies=[requires(Permission.INFER)])
async def usage(request: Request) -> JSONResponse:
    """What counts against the caller's limits now, over all models and actions that it may use."""
    state = state_of(request)
    principal = with_purpose(request.state.principal, request.headers.get("probity-purpose"))
    try:
        policy = (await state.standings.of(principal.tenant)).policy
    except StoreUnavailable:
        raise errors.audit_unavailable() from None
    source = request.client.host if request.client else None
    limits = set() if policy is None else set(_limits(state, policy, principal, source))
    pseudonym = state.log.keyring.pseudonym(principal.tenant, "subject", principal.subject)
    used = state.ledger.usage(Holder(principal.tenant, pseudonym), tuple(sorted(limits, key=_order)))
    return JSONResponse({"object": "list", "data": [_limit(limit, count) for limit, count in used.items()]})


def _limits(state: AppState, policy: EffectivePolicy, principal: Principal, source: str | None) -> Iterator[LimitSpec]:
    loaded, now = frozenset(state.engine.versions), state.clock.now()
    least = RequestedParams(None, None, None, 1)
    for alias in policy.models:
        for action in ACTIONS:
            asked = AccessRequest(principal, action, alias, principal.purpose, source, now, least)
            obligations = evaluate(asked, policy, loaded).obligations
            yield from () if obligations is None else obligations.limits


def _order(limit: LimitSpec) -> tuple[str, ...]:
    return limit.id, limit.scope.value, limit.kind.value, f"{limit.maximum:015}"


def _limit(limit: LimitSpec, used: int) -> dict[str, Any]:
    return {
        "id": limit.id,
        "scope": limit.scope.value,
        "kind": limit.kind.value,
        "maximum": limit.maximum,
        "used": used,
        "remaining": max(0, limit.maximum - used),
    }
