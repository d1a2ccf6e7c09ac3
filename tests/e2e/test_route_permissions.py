"""Every route of the real app with the one permission it declares: a new route, or a looser one, fails here first."""

from __future__ import annotations

from pathlib import Path

from gateway.app import create_app
from gateway.auth.permissions import Permission, route_permissions
from gateway.settings import load_settings
from tests.support.scripted_engine import ScriptedEngine

EXPECTED = {
    "GET /admin/tenants/{tenant}": Permission.READ_POLICY,
    "POST /admin/tenants/{tenant}:suspend": Permission.MANAGE_TENANTS,
    "POST /admin/tenants/{tenant}:resume": Permission.MANAGE_TENANTS,
    "GET /admin/tenants/{tenant}/policy": Permission.READ_POLICY,
    "POST /admin/tenants/{tenant}/policy:rollback": Permission.ACTIVATE_POLICY,
    "GET /admin/tenants/{tenant}/policy/versions": Permission.READ_POLICY,
    "POST /admin/tenants/{tenant}/policy/versions": Permission.WRITE_POLICY,
    "GET /admin/tenants/{tenant}/policy/versions/{number}": Permission.READ_POLICY,
    "POST /admin/tenants/{tenant}/policy/versions/{number}:activate": Permission.ACTIVATE_POLICY,
    "GET /audit/checkpoint": Permission.READ_RECORDS,
    "GET /audit/proofs/consistency": Permission.READ_RECORDS,
    "GET /audit/proofs/inclusion": Permission.READ_RECORDS,
    "GET /audit/requests": Permission.READ_RECORDS,
    "GET /audit/requests/{request_id}": Permission.READ_RECORDS,
    "POST /audit/requests/{request_id}:replay": Permission.REPLAY,
    "POST /audit/requests/{request_id}:reveal": Permission.REVEAL_CONTENT,
    "GET /docs": Permission.PUBLIC,
    "GET /livez": Permission.PUBLIC,
    "GET /metrics": Permission.PUBLIC,
    "GET /openapi.json": Permission.PUBLIC,
    "GET /readyz": Permission.PUBLIC,
    "GET /v1/models": Permission.INFER,
    "GET /v1/models/{alias}": Permission.INFER,
    "GET /v1/receipts/{request_id}": Permission.READ_OWN_RECEIPTS,
    "GET /v1/usage": Permission.INFER,
    "POST /v1/policy/explain": Permission.INFER,
    "POST /v1/chat/completions": Permission.INFER,
    "POST /v1/embeddings": Permission.INFER,
    "POST /v1/responses": Permission.INFER,
    "POST /v1/completions": Permission.INFER,
}


def test_every_route_declares_the_permission_that_is_listed_here(tmp_path: Path) -> None:
    settings = load_settings(None, {}, {"data_dir": str(tmp_path), "audit.low_water_mib": 1})
    app = create_app(settings, engine=ScriptedEngine())
    try:
        declared = {
            f"{method} {route.path}": route.permission
            for route in route_permissions(app)
            for method in route.methods
            if method != "HEAD"
        }
    finally:
        app.state.probity.log.close()
    assert declared == EXPECTED
