"""`/audit`: what officers see. Every look is on record before anything is shown (oversight.py); without it, a 503.

An officer of a tenant sees that tenant's records and learns of no other: an id of another tenant's is a 404, a filter
on another tenant a 403. An officer of the platform (`tenant` is `*`) sees all, and each tenant's log knows of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Annotated, Any, ParamSpec, TypeVar

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import PlainTextResponse, Response

from audit.merkle import OutOfRange
from audit.query import QueryRefused, RequestPage, RequestQuery
from audit.reader import ContentErased, EvidenceDamaged, InclusionProof, NotFound, NotSignedYet, RevealedContent
from audit.records import SYSTEM, Json, Record
from engine.replay import ReplayInterrupted
from engine.request import EngineDraining, EngineError, EngineOverloaded, RequestRefused
from gateway import errors, problems
from gateway.admission import parse_json
from gateway.auth.claims import PLATFORM, TENANT
from gateway.auth.permissions import Permission, covers_tenant, require_tenant, requires
from gateway.error_responses import invalid_fields
from gateway.errors import ApiError
from gateway.oversight import Officer, put, read_record, replayed_record, revealed_record
from gateway.replay import Replay, ReplayRefused, recording, replay
from gateway.schemas.oversight import ReplayBody, RequestFilters, RevealBody
from gateway.state import AppState, state_of
from policies.request import Principal


class Watched(APIRoute):
    """A route for officers: that it refused, somebody else's records or any at all, is on record too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        look, view = super().get_route_handler(), self.name

        async def handle(request: Request) -> Response:
            try:
                return await look(request)
            except ApiError as refused:
                if not isinstance(getattr(request.state, "principal", None), Principal):
                    raise
                asked = request.path_params.get("request_id", "")
                filters = {"request": asked} if _REQUEST_ID.fullmatch(asked) else {}
                raise await state_of(request).refusals.look(refused, view, officer_of(request), filters) from None

        return handle


router = APIRouter(prefix="/audit", route_class=Watched)

P = ParamSpec("P")
T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

_REQUEST_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TOLD_ON_RECORD = frozenset({"content_erased", "evidence_damaged"})
_WRITER = r"^[0-9a-f]{16}$"

TenantParameter = Annotated[str | None, Query(max_length=63, description="whose log; by default the officer's own")]
Count = Annotated[int, Query(ge=0, le=2**53 - 1)]
OptionalCount = Annotated[int | None, Query(ge=0, le=2**53 - 1)]
_RECORDS = [requires(Permission.READ_RECORDS)]


# --- requests ---


@router.get("/requests", name="requests", dependencies=_RECORDS)
async def list_requests(request: Request, filters: Annotated[RequestFilters, Query()]) -> dict[str, Any]:
    """Requests of a time window, newest first, in slices; `after` leads to the next."""
    state, officer = state_of(request), officer_of(request)
    query = _query(officer, filters)
    page: RequestPage = await _read(state, state.reader.requests, query)
    await put(state.log, _list_records(officer, filters, page))
    return asdict(page)


@router.get("/requests/{request_id}", name="request", dependencies=_RECORDS)
async def show_request(request: Request, request_id: str) -> dict[str, Any]:
    """The whole story of one request, without what was said."""
    state, officer = state_of(request), officer_of(request)
    tenant = await _tenant_of(state, officer, request_id)
    story = await _read(state, state.reader.story, request_id)
    await put(state.log, [read_record(officer, tenant, "request", {"request": request_id}, rows=1)])
    return asdict(story)


@router.post("/requests/{request_id}:reveal", name="reveal", dependencies=[requires(Permission.REVEAL_CONTENT)])
async def reveal(request: Request, request_id: str) -> dict[str, Any]:
    """What was said. The reason goes on record."""
    state, officer = state_of(request), officer_of(request)
    body = await read_body(request, RevealBody)
    tenant = await _tenant_of(state, officer, request_id)
    content = await _content(state, officer, tenant, request_id, "reveal")
    await put(state.log, [revealed_record(officer, tenant, request_id, body.reason, body.case)])
    return {
        "request_id": request_id,
        "tenant": tenant,
        "identities": dict(content.identities),
        "prompt": _text(content.prompt),
        "prompt_to_model": _text(content.prompt_to_model),
        "output": None if content.output is None else orjson.loads(content.output),
        "logprobs": None if content.logprobs is None else orjson.loads(content.logprobs),
    }


@router.post("/requests/{request_id}:replay", name="replay", dependencies=[requires(Permission.REPLAY)])
async def replay_request(request: Request, request_id: str) -> dict[str, Any]:
    """Have the answer come out again and say whether it is the same. Shows none of it."""
    state, officer = state_of(request), officer_of(request)
    body = await read_body(request, ReplayBody)
    tenant = await _tenant_of(state, officer, request_id)
    leaves = await _read(state, state.reader.leaves, request_id)
    content = await _content(state, officer, tenant, request_id, "replay")
    try:
        recorded = recording([stored.leaf for stored in leaves], content)
        outcome: Replay = await replay(state.engine, recorded, f"replay/{request.state.request_id}", body.mode)
    except ReplayRefused as refused:  # why not says something of the request
        await put(state.log, [read_record(officer, tenant, "replay", {"request": request_id}, rows=1)])
        raise problems.not_replayable(str(refused)) from None
    except (EngineOverloaded, ReplayInterrupted):
        raise errors.overloaded() from None
    except EngineDraining:
        raise errors.draining() from None
    except RequestRefused:
        raise problems.not_replayable("the engine that is loaded does not take the recorded request") from None
    except EngineError:
        raise errors.engine_unavailable() from None
    await put(state.log, [replayed_record(officer, tenant, request_id, outcome.recorded())])
    return asdict(outcome)


# --- proofs ---


@router.get("/checkpoint", name="checkpoint", dependencies=_RECORDS, response_class=PlainTextResponse)
async def checkpoint(request: Request, tenant: TenantParameter = None) -> PlainTextResponse:
    """The newest checkpoint of a log, a signed note."""
    state, officer = state_of(request), officer_of(request)
    tenant = _log_tenant(officer, tenant)
    signed = await _read(state, state.reader.checkpoint, tenant)
    await put(state.log, [read_record(officer, tenant, "checkpoint", {"size": signed.checkpoint.size}, rows=1)])
    return PlainTextResponse(signed.note)


@router.get("/proofs/inclusion", name="proof.inclusion", dependencies=_RECORDS)
async def inclusion(
    request: Request,
    tenant: TenantParameter = None,
    leaf_index: OptionalCount = None,
    writer: Annotated[str | None, Query(pattern=_WRITER)] = None,
    writer_seq: OptionalCount = None,
    size: OptionalCount = None,
) -> dict[str, Any]:
    """Proof that a leaf stands in the log: give `leaf_index`, or `writer` and `writer_seq` of a receipt."""
    state, officer = state_of(request), officer_of(request)
    tenant = _log_tenant(officer, tenant)
    if (writer is None) != (writer_seq is None) or (leaf_index is None) == (writer is None):
        raise errors.invalid_request("give `leaf_index`, or `writer` and `writer_seq`", param="leaf_index")
    proof: InclusionProof
    if writer is not None and writer_seq is not None:
        proof = await _read(state, state.reader.inclusion, tenant, writer, writer_seq, size)
    else:
        proof = await _read(state, state.reader.inclusion_at, tenant, leaf_index or 0, size)
    looked_at: dict[str, Json] = {"leaf_index": proof.leaf_index, "size": proof.signed.checkpoint.size}
    await put(state.log, [read_record(officer, tenant, "proof.inclusion", looked_at, rows=1)])
    return {
        "log": proof.log,
        "leaf_index": proof.leaf_index,
        "leaf_hash": proof.leaf_hash.hex(),
        "tree_size": proof.signed.checkpoint.size,
        "hashes": [hashed.hex() for hashed in proof.hashes],
        "checkpoint": proof.signed.note,
    }


@router.get("/proofs/consistency", name="proof.consistency", dependencies=_RECORDS)
async def consistency(request: Request, old: Count, new: Count, tenant: TenantParameter = None) -> dict[str, Any]:
    """Proof that the log of `new` leaves extends that of `old`."""
    state, officer = state_of(request), officer_of(request)
    tenant = _log_tenant(officer, tenant)
    proof = await _read(state, state.reader.consistency, tenant, old, new)
    await put(state.log, [read_record(officer, tenant, "proof.consistency", {"old": old, "new": new}, rows=1)])
    return {"log": proof.log, "old": proof.old, "new": proof.new, "hashes": [hashed.hex() for hashed in proof.hashes]}


# --- who may see what ---


def officer_of(request: Request) -> Officer:
    return Officer(request.state.principal, request.client.host if request.client else None)


def _query(officer: Officer, filters: RequestFilters) -> RequestQuery:
    if filters.tenant is not None:
        require_tenant(officer.principal, filters.tenant)
    own = None if officer.principal.tenant == PLATFORM else officer.principal.tenant
    tenant = filters.tenant or own
    try:
        return filters.query(None if tenant is None else (tenant,))
    except QueryRefused as refused:
        raise errors.invalid_request(str(refused)) from None


def _list_records(officer: Officer, filters: RequestFilters, page: RequestPage) -> list[Record]:
    rows = Counter(row.tenant for row in page.requests) or Counter({officer.home: 0})
    recorded, about, typed = filters.recorded(), filters.subject, filters.typed()
    return [read_record(officer, tenant, "requests", recorded, count, about, typed) for tenant, count in rows.items()]


async def _tenant_of(state: AppState, officer: Officer, request_id: str) -> str:
    """Return whose request it is. Another tenant's is not there: one answer."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise errors.not_found()
    tenant = await _read(state, state.reader.tenant_of, request_id)
    if not covers_tenant(officer.principal, tenant):
        raise errors.not_found()
    return tenant


def _log_tenant(officer: Officer, tenant: str | None) -> str:
    """Return whose log is asked for. The platform's own is for its officers."""
    if tenant is None:
        return officer.home
    if tenant != SYSTEM and not TENANT.fullmatch(tenant):
        raise errors.invalid_request("`tenant` is not the name of a tenant", param="tenant")
    require_tenant(officer.principal, tenant)
    return tenant


async def _content(state: AppState, officer: Officer, tenant: str, request_id: str, view: str) -> RevealedContent:
    """Return what was said. That it is not there any more, or not what it was, is told on record only."""
    try:
        content: RevealedContent = await _read(state, state.reader.reveal, request_id)
    except ApiError as refused:
        if refused.code in TOLD_ON_RECORD:
            await put(state.log, [read_record(officer, tenant, view, {"request": request_id}, rows=1)])
        raise
    return content


# --- plumbing ---


async def read_body(request: Request, model: type[B]) -> B:
    """Return the body, or refuse without repeating any of it."""
    try:
        return model.model_validate(parse_json(await request.body()))
    except ValidationError as invalid:
        raise invalid_fields(invalid, model) from None


async def _read(state: AppState, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what the log holds; its refusals become ours."""
    try:
        return await state.reads.run(read, *args, **kwargs)
    except NotFound:
        raise errors.not_found() from None
    except NotSignedYet:
        raise problems.not_signed_yet() from None
    except ContentErased:
        raise problems.content_erased() from None
    except EvidenceDamaged:
        raise problems.evidence_damaged() from None
    except OutOfRange:
        raise errors.invalid_request("the sizes are not 1 ≤ `old` ≤ `new`", param="old") from None
    except SQLAlchemyError:
        raise errors.audit_unavailable() from None


def _text(part: bytes | None) -> str | None:
    return None if part is None else part.decode("utf-8", "replace")
