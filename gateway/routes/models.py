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
    return {"object": "list", "data": [_model(request, alias, version) for alias, version in await _versions(request)]}


@router.get("/{alias}")
async def get_model(request: Request, alias: str) -> dict[str, Any]:
    version = dict(await _versions(request)).get(alias)
    if version is None:
        raise errors.model_not_found()
    return _model(request, alias, version)


async def _versions(request: Request) -> list[tuple[str, str]]:
    """Return the aliases with the digest of the model version that each stands for."""
    state = state_of(request)
    try:
        policy = (await state.standings.of(request.state.principal.tenant)).policy
    except StoreUnavailable:
        raise errors.audit_unavailable() from None
    if policy is None:
        return []
    loaded, today = state.engine.versions, state.clock.now().date().isoformat()
    return sorted(
        (alias, grant.version)
        for alias, grant in policy.models.items()
        if grant.version in loaded and today <= grant.expires
    )


def _model(request: Request, alias: str, version: str) -> dict[str, Any]:
    state = state_of(request)
    return {
        "id": alias,
        "object": "model",
        "created": int(state.started.timestamp()),
        "owned_by": "probity",
        "version": version,
        "context_length": state.engine.context_length,
    }
