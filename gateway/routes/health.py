"""`/livez`, `/readyz`, `/metrics`, `/openapi.json`, `/docs`: for those who watch this process, or wonder what it does.

No content, no names of people.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gateway.auth.permissions import PUBLIC
from gateway.openapi import CONTENT_SECURITY_POLICY, description, page
from gateway.state import AppState, state_of

router = APIRouter(dependencies=[PUBLIC])


@router.get("/livez")
async def livez(request: Request) -> Response:
    """200 while the event loop turns and the log lives; a process whose log has died is ending. Says nothing of the
    engine, nor whether the log confirms just now."""
    alive = state_of(request).log.health().alive
    return JSONResponse({"status": "ok" if alive else "dead"}, status_code=200 if alive else 503)


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when a request could be answered now; else 503 with the checks that fail, by name."""
    checks = _checks(state_of(request))
    ready = all(checks.values())
    body = {"status": "ok" if ready else "unavailable", "checks": checks}
    return JSONResponse(body, status_code=200 if ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state = state_of(request)
    payload = state.telemetry.exposition(state.engine.health(), state.log.health(), state.pipeline.governed)
    return Response(payload, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    return JSONResponse(description(request.app))


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff"}
    return Response(page(description(request.app)), media_type="text/html; charset=utf-8", headers=headers)


def _checks(state: AppState) -> dict[str, bool]:
    log, engine = state.log.health(), state.engine.health()
    return {
        "engine": engine.alive,
        "audit_log": log.alive,
        "database": log.confirming and state.policies.fresh,
        "disk": not log.disk_low,
        "accepting": not state.pipeline.draining,
    }
