"""`/admin/tenants/{tenant}`: policies and status. Every change states what its author saw (`if-match`) and why.

The ETag of everything about one tenant is its generation, which counts changes: `"7"`. A tenant named `*` is the
organisation's floor, for administrators of the platform. Nobody reads a prompt or an output here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, ParamSpec, TypeVar

import orjson
from fastapi import APIRouter, Path, Query, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from audit.writer import LogError
from gateway import errors, problems
from gateway.auth.claims import RESERVED_TENANTS, TENANT
from gateway.auth.permissions import Permission, require_tenant, requires
from gateway.policy_change import Change, PolicyChanges
from gateway.routes.audit import officer_of, read_body
from gateway.schemas.administration import ChangeBody, RollbackBody, VersionBody
from gateway.state import AppState, state_of
from policies.document import (
    FLOOR_TENANT,
    Finding,
    PolicyDocument,
    PolicyInvalid,
    read_submitted,
    warnings,
)
from policies.store import AlreadySo, NoSuchVersion, StaleGeneration, StoredVersion, StoreUnavailable, TenantState

router = APIRouter(prefix="/admin/tenants")

P = ParamSpec("P")
T = TypeVar("T")

MAX_VERSIONS = 100  # of one list

VersionNumber = Annotated[int, Path(ge=1, le=2**31 - 1)]
_READ = [requires(Permission.READ_POLICY)]
_WRITE = [requires(Permission.WRITE_POLICY)]
_ACTIVATE = [requires(Permission.ACTIVATE_POLICY)]
_MANAGE = [requires(Permission.MANAGE_TENANTS)]


# --- reading ---


@router.get("/{tenant}", dependencies=_READ)
async def show_tenant(request: Request, tenant: str) -> JSONResponse:
    """Whether the tenant is served, and under which version of its policy."""
    current = await _state(request, tenant)
    status = "suspended" if current.suspended else "active"
    return _tagged({"tenant": tenant, "status": status, "policy_version": current.active_version}, current.generation)


@router.get("/{tenant}/policy", dependencies=_READ)
async def show_policy(request: Request, tenant: str) -> JSONResponse:
    """The version that holds."""
    current, store = await _state(request, tenant), state_of(request).policies
    if current.active_version is None:
        raise errors.not_found().with_headers({"etag": _etag(current.generation)})
    version = await _read(store.version, tenant, current.active_version)
    effective = await _read(store.current, tenant)
    shown = _version(version) | {"effective_digest": None if effective is None else effective.digest}
    return _tagged(shown, current.generation)


@router.get("/{tenant}/policy/versions", dependencies=_READ)
async def list_versions(
    request: Request,
    tenant: str,
    after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_VERSIONS)] = MAX_VERSIONS,
) -> JSONResponse:
    """All versions, oldest first, without their documents; `after` leads to the next slice."""
    current = await _state(request, tenant)
    found = await _read(state_of(request).policies.versions, tenant, after=after, limit=limit + 1)
    shown = found[:limit]
    body = {
        "active": current.active_version,
        "versions": [_summary(version) for version in shown],
        "after": shown[-1].version if len(found) > limit else None,
    }
    return _tagged(body, current.generation)


@router.get("/{tenant}/policy/versions/{number}", dependencies=_READ)
async def show_version(request: Request, tenant: str, number: VersionNumber) -> JSONResponse:
    current = await _state(request, tenant)
    return _tagged(_version(await _read(state_of(request).policies.version, tenant, number)), current.generation)


# --- changing ---


@router.post("/{tenant}/policy/versions", dependencies=_WRITE)
async def create_version(request: Request, tenant: str) -> JSONResponse:
    """Store a new, validated version. It holds once somebody activates it."""
    body = await read_body(request, VersionBody)
    change = await _change(request, tenant, body)
    reads, today = state_of(request).reads, state_of(request).clock.now().date()
    document = await reads.run(_document, body, tenant)  # beside the event loop: seconds, where it is long
    number = await _made(request, _changes(request).draft(change, document), change)
    found = await reads.run(warnings, document, today)
    answer = {"tenant": tenant, "version": number, "warnings": [_finding(finding) for finding in found]}
    location = f"/admin/tenants/{tenant}/policy/versions/{number}"
    return _tagged(answer, change.generation + 1, status=201, headers={"location": location})


@router.post("/{tenant}/policy/versions/{number}:activate", dependencies=_ACTIVATE)
async def activate(request: Request, tenant: str, number: VersionNumber) -> JSONResponse:
    """Let a version hold, from the next request on; requests in progress keep the one they started with."""
    body = await read_body(request, ChangeBody)
    change = await _change(request, tenant, body)
    effective = await _made(request, _changes(request).activate(change, number), change)
    answer = {"tenant": tenant, "version": number, "effective_digest": effective.digest}
    return _tagged(answer, change.generation + 1)


@router.post("/{tenant}/policy:rollback", dependencies=_ACTIVATE)
async def roll_back(request: Request, tenant: str) -> JSONResponse:
    """Let an earlier version hold again, as a new version."""
    body = await read_body(request, RollbackBody)
    change = await _change(request, tenant, body)
    number, effective = await _made(request, _changes(request).roll_back(change, body.to), change)
    current = await _state(request, tenant)
    answer = {"tenant": tenant, "version": number, "to": body.to, "effective_digest": effective.digest}
    return _tagged(answer, current.generation)


@router.post("/{tenant}:suspend", dependencies=_MANAGE)
async def suspend(request: Request, tenant: str) -> JSONResponse:
    """Stop serving a tenant, answers in progress included."""
    return await _set_suspended(request, tenant, suspended=True)


@router.post("/{tenant}:resume", dependencies=_MANAGE)
async def resume(request: Request, tenant: str) -> JSONResponse:
    return await _set_suspended(request, tenant, suspended=False)


async def _set_suspended(request: Request, tenant: str, *, suspended: bool) -> JSONResponse:
    if tenant == FLOOR_TENANT:
        raise errors.not_found()
    body = await read_body(request, ChangeBody)
    change = await _change(request, tenant, body)
    await _made(request, _changes(request).suspend(change, suspended), change)
    if suspended:
        state_of(request).pipeline.forget_cache(tenant)
    status = "suspended" if suspended else "active"
    return _tagged({"tenant": tenant, "status": status}, change.generation + 1)


# --- what a change is made against ---


async def _change(request: Request, tenant: str, body: ChangeBody) -> Change:
    """Return the change, or refuse: nothing said about what was seen, or something else seen than is."""
    current = await _state(request, tenant)
    tags = [tag.strip() for value in request.headers.getlist("if-match") for tag in value.split(",")]
    if not tags:
        raise problems.precondition_required()
    if _etag(current.generation) not in tags:
        raise problems.precondition_failed(_etag(current.generation))
    return Change(officer_of(request), tenant, body.reason, current.generation)


async def _made(request: Request, making: Awaitable[T], change: Change) -> T:
    """Return what the change made; its refusals become ours."""
    try:
        return await making
    except PolicyInvalid as invalid:
        raise problems.PolicyRefused([(finding.path, finding.message) for finding in invalid.findings]) from None
    except StaleGeneration:
        raise problems.precondition_failed(_etag((await _state(request, change.tenant)).generation)) from None
    except NoSuchVersion:
        raise errors.not_found() from None
    except AlreadySo as already:
        raise problems.conflict(str(already)) from None
    except (LogError, SQLAlchemyError, StoreUnavailable):
        raise errors.audit_unavailable() from None


def _document(body: VersionBody, tenant: str) -> PolicyDocument:
    """Return the document, whole and the tenant's own. Raises: ApiError with every finding."""
    try:
        document = read_submitted(body.document)
        if document.tenant != tenant:
            raise PolicyInvalid([Finding("tenant", "is not the tenant whose policy this is")])
    except PolicyInvalid as invalid:
        raise problems.PolicyRefused([(finding.path, finding.message) for finding in invalid.findings]) from None
    return document


# --- plumbing ---


async def _state(request: Request, tenant: str) -> TenantState:
    """Return the tenant's state, if this administrator may ask for it."""
    if tenant != FLOOR_TENANT and (not TENANT.fullmatch(tenant) or tenant in RESERVED_TENANTS):
        raise errors.not_found()
    require_tenant(request.state.principal, tenant)
    return await _read(state_of(request).policies.state, tenant)


async def _read(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(read, *args, **kwargs)
    except NoSuchVersion:
        raise errors.not_found() from None
    except (SQLAlchemyError, StoreUnavailable):
        raise errors.audit_unavailable() from None


def _changes(request: Request) -> PolicyChanges:
    state: AppState = state_of(request)
    return PolicyChanges(state.policies, state.log, state.clock.now)


def _etag(generation: int) -> str:
    return f'"{generation}"'


def _tagged(
    body: dict[str, Any], generation: int, *, status: int = 200, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(body, status, {"etag": _etag(generation), "cache-control": "no-store"} | (headers or {}))


def _summary(version: StoredVersion) -> dict[str, Any]:
    return {
        "tenant": version.tenant,
        "version": version.version,
        "digest": version.digest,
        "author": version.author,  # pseudonym
        "reason": version.reason,
        "created_at": _time(version.created_at),
    }


def _version(version: StoredVersion) -> dict[str, Any]:
    return _summary(version) | {"document": orjson.loads(version.document.canonical())}


def _finding(finding: Finding) -> dict[str, str]:
    return {"path": finding.path, "message": finding.message}


def _time(moment_us: int) -> str:
    return datetime.fromtimestamp(moment_us / 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
