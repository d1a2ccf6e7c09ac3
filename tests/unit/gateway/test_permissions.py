"""Permissions: declared on routes, checked there, and complete."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from httpx import ASGITransport, AsyncClient
from starlette.types import ASGIApp

from gateway.auth.authentication import Authentication, with_purpose
from gateway.auth.permissions import (
    PUBLIC,
    ROLE_PERMISSIONS,
    Permission,
    RoutePermission,
    UndeclaredPermission,
    covers_tenant,
    permissions_of,
    public_paths,
    require_tenant,
    requires,
    route_permissions,
)
from gateway.error_responses import Containment, install_error_handlers
from gateway.errors import ApiError
from policies.request import Principal
from tests.support.credentials import credential, good_claims, verifier


def make_app() -> FastAPI:
    app = FastAPI(openapi_url=None)
    health = APIRouter(dependencies=[PUBLIC])
    inference = APIRouter(prefix="/v1")
    admin = APIRouter(prefix="/admin", dependencies=[requires(Permission.READ_POLICY)])

    @health.get("/livez")
    async def livez() -> str:
        return "ok"

    @inference.post("/completions", dependencies=[requires(Permission.INFER)])
    async def completions() -> str:
        return "ok"

    @inference.get("/whoami", dependencies=[requires(Permission.AUTHENTICATED)])
    async def whoami() -> str:
        return "ok"

    @admin.get("/tenants/{tenant}/policy")
    async def policy(tenant: str) -> str:
        return tenant

    for router in (health, inference, admin):
        app.include_router(router)
    install_error_handlers(app)
    return app


def guarded(app: FastAPI) -> ASGIApp:
    return Containment(Authentication(app, verifier(), public_paths(app)))


async def ask(method: str, path: str, roles: list[str] | None, tenant: str = "acme-bank") -> tuple[int, str]:
    headers = {}
    if roles is not None:
        headers["authorization"] = f"Bearer {credential(good_claims(roles=roles, tenant=tenant))}"
    async with AsyncClient(transport=ASGITransport(guarded(make_app())), base_url="http://probity") as client:
        response = await client.request(method, path, headers=headers)
    return response.status_code, response.text


def test_every_route_of_an_app_is_listed_with_what_it_declares() -> None:
    assert route_permissions(make_app()) == [
        RoutePermission("/admin/tenants/{tenant}/policy", ("GET",), Permission.READ_POLICY),
        RoutePermission("/livez", ("GET",), Permission.PUBLIC),
        RoutePermission("/v1/completions", ("POST",), Permission.INFER),
        RoutePermission("/v1/whoami", ("GET",), Permission.AUTHENTICATED),
    ]
    assert public_paths(make_app()) == {"/livez"}


@pytest.mark.parametrize(
    ("method", "path", "roles", "status"),
    [
        ("GET", "/livez", None, 200),
        ("POST", "/v1/completions", None, 401),
        ("POST", "/v1/completions", ["app"], 200),
        ("POST", "/v1/completions", ["contact-centre"], 403),  # a business role alone permits nothing
        ("POST", "/v1/completions", ["auditor", "admin"], 403),
        ("POST", "/v1/completions", ["contact-centre", "app"], 200),
        ("GET", "/v1/whoami", ["contact-centre"], 200),
        ("GET", "/admin/tenants/x/policy", ["app"], 403),
        ("GET", "/admin/tenants/x/policy", ["admin"], 200),
        ("GET", "/nothing", None, 401),
        ("GET", "/nothing", ["app"], 404),
    ],
)
async def test_a_role_permits_what_its_row_says(method: str, path: str, roles: list[str] | None, status: int) -> None:
    assert (await ask(method, path, roles))[0] == status


async def test_a_platform_wide_credential_asks_no_model() -> None:
    assert (await ask("POST", "/v1/completions", ["app"], tenant="*"))[0] == 403
    assert (await ask("GET", "/admin/tenants/x/policy", ["admin"], tenant="*"))[0] == 200


async def test_a_route_refuses_when_the_authentication_in_front_is_missing() -> None:
    async with AsyncClient(transport=ASGITransport(make_app()), base_url="http://probity") as client:
        response = await client.post("/v1/completions", headers={"x-principal": "admin"})
    assert response.status_code == 401


def undeclared(app: FastAPI) -> None:
    app.get("/open")(nothing)


def twice_declared(app: FastAPI) -> None:
    app.get("/two", dependencies=[PUBLIC, requires(Permission.INFER)])(nothing)


def public_pattern(app: FastAPI) -> None:
    app.get("/files/{name}", dependencies=[PUBLIC])(nothing)


def half_public(app: FastAPI) -> None:
    app.get("/half", dependencies=[PUBLIC])(nothing)
    app.post("/half", dependencies=[requires(Permission.INFER)])(nothing)


def mounted(app: FastAPI) -> None:
    app.mount("/sub", FastAPI(openapi_url=None))


def plain_route(app: FastAPI) -> None:
    app.router.add_route("/plain", nothing)


async def nothing(request: Any = None) -> None:
    return None


@pytest.mark.parametrize("add", [undeclared, twice_declared, public_pattern, half_public, mounted, plain_route])
def test_an_app_with_a_route_that_does_not_say_one_thing_does_not_start(add: Any) -> None:
    app = make_app()
    add(app)
    with pytest.raises(UndeclaredPermission):
        public_paths(app)


def test_the_frameworks_own_documentation_must_be_declared_too() -> None:
    with pytest.raises(UndeclaredPermission, match=r"/openapi\.json"):
        public_paths(FastAPI())


def test_nobody_reads_content_by_being_admin() -> None:
    content = {Permission.REVEAL_CONTENT, Permission.REPLAY}
    assert {role for role, granted in ROLE_PERMISSIONS.items() if granted & content} == {"auditor"}
    assert {role for role, granted in ROLE_PERMISSIONS.items() if Permission.INFER in granted} == {"app"}
    assert permissions_of(["nobody-knows"]) == {Permission.AUTHENTICATED}


def test_whoever_writes_a_policy_cannot_activate_it_by_that_role() -> None:
    assert Permission.ACTIVATE_POLICY not in permissions_of(["policy_author", "operator", "auditor"])
    assert Permission.WRITE_POLICY not in permissions_of(["policy_approver", "admin"])


def principal(tenant: str) -> Principal:
    return Principal("iss", "mia", tenant, frozenset({"admin"}), None, None)


def test_a_principal_acts_for_its_own_tenant_or_for_the_platform() -> None:
    assert covers_tenant(principal("acme-bank"), "acme-bank")
    assert covers_tenant(principal("*"), "acme-bank")
    for tenant in ("globex-health", "*", "", "acme-bank2"):
        with pytest.raises(ApiError) as caught:
            require_tenant(principal("acme-bank"), tenant)
        assert caught.value.status == 403


def test_public_is_declared_by_its_own_name() -> None:
    with pytest.raises(ValueError, match="PUBLIC"):
        requires(Permission.PUBLIC)


def test_the_purpose_header_goes_before_the_claim() -> None:
    assert with_purpose(principal("a"), None).purpose is None
    assert with_purpose(principal("a"), "code-assist").purpose == "code-assist"
    for header in ("", "a b", "A", "x" * 65, "a\n", "ä"):
        with pytest.raises(ApiError) as caught:
            with_purpose(principal("a"), header)
        assert (caught.value.status, caught.value.param) == (400, "probity-purpose")
