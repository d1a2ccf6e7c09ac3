"""`GET /v1/models` and `/v1/models/{id}`: the aliases that this tenant's policy approves and this engine has loaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway import errors
from gateway.auth.permissions import Permission, requires
from gateway.state import state_of
from policies.store import StoreUnavailable

router = APIRouter(prefix="/v1/models", dependencies=[requires(Permission.INFER)])


@router.get("")
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request, alias) for alias in _aliases(request)]}


@router.get("/{alias}")
async def get_model(request: Request, alias: str) -> dict[str, Any]:
    if alias not in _aliases(request):
        raise errors.model_not_found()
    return _model(request, alias)


def _aliases(request: Request) -> list[str]:
    state = state_of(request)
    try:
        policy = state.policies.current(request.state.principal.tenant)
    except StoreUnavailable:
        raise errors.audit_unavailable() from None
    if policy is None:
        return []
    loaded, today = state.engine.model.digest, state.clock.now().date().isoformat()
    return sorted(alias for alias, grant in policy.models.items() if grant.version == loaded and today <= grant.expires)


def _model(request: Request, alias: str) -> dict[str, Any]:
    state = state_of(request)
    return {
        "id": alias,
        "object": "model",
        "created": int(state.started.timestamp()),
        "owned_by": "probity",
        "version": state.engine.model.digest,
        "context_length": state.engine.context_length,
    }
