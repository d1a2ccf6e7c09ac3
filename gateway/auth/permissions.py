"""What a role may do, declared on the route that does it.

    @router.post("/v1/chat/completions", dependencies=[requires(Permission.INFER)])
    async def chat_completions(request: Request) -> Response: …

The check runs where it is declared, on the route that the framework matched. Nothing here looks at a path to decide
what is allowed, but for the list of public routes, which is derived from the declarations (see `public_paths`).
Roles that are not in the table are business roles: they permit nothing at the edge and are there for policy rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import Request

from gateway import errors
from gateway.auth.claims import PLATFORM
from policies.request import Principal


class Permission(StrEnum):
    PUBLIC = "public"  # no credential
    AUTHENTICATED = "authenticated"  # any good credential
    INFER = "infer"
    READ_OWN_RECEIPTS = "read_own_receipts"
    READ_RECORDS = "read_records"  # metadata, checkpoints, proofs
    REVEAL_CONTENT = "reveal_content"  # prompts and outputs
    REPLAY = "replay"
    READ_POLICY = "read_policy"
    WRITE_POLICY = "write_policy"
    ACTIVATE_POLICY = "activate_policy"
    READ_PLATFORM = "read_platform"  # tenants, models, limits
    MANAGE_TENANTS = "manage_tenants"
    OPERATE = "operate"  # kill switches, draining
    MANAGE_ERASURE = "manage_erasure"  # holds, retention, erasure requests


# Nobody reads content by being admin.
ROLE_PERMISSIONS: dict[str, frozenset[Permission]] = {
    "app": frozenset({Permission.INFER, Permission.READ_OWN_RECEIPTS}),
    "auditor": frozenset(
        {Permission.READ_RECORDS, Permission.REVEAL_CONTENT, Permission.REPLAY, Permission.READ_POLICY}
    ),
    "policy_author": frozenset({Permission.READ_POLICY, Permission.WRITE_POLICY}),
    "policy_approver": frozenset({Permission.READ_POLICY, Permission.ACTIVATE_POLICY}),
    "admin": frozenset(
        {
            Permission.READ_POLICY,
            Permission.ACTIVATE_POLICY,
            Permission.READ_PLATFORM,
            Permission.MANAGE_TENANTS,
            Permission.OPERATE,
        }
    ),
    "operator": frozenset({Permission.READ_PLATFORM, Permission.OPERATE}),
    "dpo": frozenset({Permission.READ_RECORDS, Permission.MANAGE_ERASURE}),
}

# These act as one tenant: a platform-wide credential would put them on nobody's record.
_OF_ONE_TENANT = frozenset({Permission.INFER, Permission.READ_OWN_RECEIPTS})


def permissions_of(roles: Iterable[str]) -> frozenset[Permission]:
    granted = (ROLE_PERMISSIONS.get(role, frozenset()) for role in roles)
    return frozenset({Permission.AUTHENTICATED}).union(*granted)


@dataclass(frozen=True, slots=True)
class Requirement:
    """A route's declaration, as a dependency: returns the principal, or refuses with 403."""

    permission: Permission

    async def __call__(self, request: Request) -> Principal:
        principal = getattr(request.state, "principal", None)
        if not isinstance(principal, Principal):
            # The authentication in front is missing: refuse rather than guess.
            raise errors.invalid_api_key()
        if self.permission not in permissions_of(principal.roles):
            raise errors.permission_denied()
        if principal.tenant == PLATFORM and self.permission in _OF_ONE_TENANT:
            raise errors.permission_denied()
        return principal


@dataclass(frozen=True, slots=True)
class PublicRequirement:
    """A route that needs no credential says so."""

    permission: Permission = Permission.PUBLIC

    async def __call__(self) -> None:
        return None


PUBLIC: Any = Depends(PublicRequirement())  # what a public route declares


def requires(permission: Permission) -> Any:
    """Return what a route, or a router for all of its routes, lists among its dependencies.

    Raises: ValueError for `Permission.PUBLIC`: declare `PUBLIC` instead.
    """
    if permission is Permission.PUBLIC:
        raise ValueError("a public route declares `PUBLIC`")
    return Depends(Requirement(permission))


# --- tenants ---


def covers_tenant(principal: Principal, tenant: str) -> bool:
    return principal.tenant in (tenant, PLATFORM)


def require_tenant(principal: Principal, tenant: str) -> None:
    """Refuse unless the principal may act for `tenant`, whether or not that tenant exists. Raises: ApiError."""
    if not covers_tenant(principal, tenant):
        raise errors.permission_denied()


# --- what an app declares ---


class UndeclaredPermission(Exception):
    """A route declares no permission, or several, or is public under a path that is a pattern."""


@dataclass(frozen=True, slots=True, order=True)
class RoutePermission:
    path: str
    methods: tuple[str, ...]
    permission: Permission | None  # None: nothing, or no one thing, is declared


def route_permissions(app: FastAPI) -> list[RoutePermission]:
    """Return every route of `app` with what it declares, by path. Mounts and plain routes declare nothing."""
    return sorted(_declarations(app), key=lambda route: (route.path, route.methods))


def _declarations(app: FastAPI) -> Iterator[RoutePermission]:
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        found = set(_requirements(route.dependant)) if isinstance(route, APIRoute) else set()
        permission = found.pop() if len(found) == 1 else None
        yield RoutePermission(context.path or "", tuple(sorted(getattr(route, "methods", None) or ())), permission)


def _requirements(dependant: Any) -> Iterator[Permission]:
    for dependency in dependant.dependencies:
        if isinstance(dependency.call, Requirement | PublicRequirement):
            yield dependency.call.permission
        yield from _requirements(dependency)


def public_paths(app: FastAPI) -> frozenset[str]:
    """Return the exact paths that need no credential. Call it when all routes are in.

    Raises: UndeclaredPermission: some route declares nothing; the app must not start.
    """
    routes = route_permissions(app)
    undeclared = [route.path for route in routes if route.permission is None]
    patterns = [route.path for route in routes if route.permission is Permission.PUBLIC and "{" in route.path]
    if undeclared or patterns:
        raise UndeclaredPermission(f"declare one permission on each of: {', '.join(undeclared + patterns)}")
    public = {route.path for route in routes if route.permission is Permission.PUBLIC}
    guarded = {route.path for route in routes if route.permission is not Permission.PUBLIC}
    if public & guarded:
        raise UndeclaredPermission(f"public for one method and guarded for another: {', '.join(public & guarded)}")
    return frozenset(public)
