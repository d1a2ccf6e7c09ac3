"""What an officer asks for: filters over the requests of a time window, and the answer in keyset slices.

A slice ends with a cursor, the place of its last row, so that a log of any size is read through without counting and
without an offset; rows that arrive meanwhile do not shift it. Pure: a query in, a SELECT out. Knows no permissions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, literal, or_, select, tuple_

from audit.tables import request_index

# QueryRefused    the only error: a filter is not of its form; the message names it


class QueryRefused(ValueError):
    """A filter of the query is not of its form."""


MAX_LIMIT = 500  # rows a slice
MAX_TEXT = 512  # characters of a filter
MAX_WINDOW = timedelta(days=3660)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(9999, 1, 1, tzinfo=UTC)  # what follows has no time in every zone
STATUSES = frozenset({"received", "completed", "denied", "failed", "interrupted", "cancelled"})

_PSEUDONYM = re.compile(r"[0-9a-f]{32}")
_CURSOR = re.compile(r"([0-9]{1,18})\.([0-9a-f-]{36})", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestQuery:
    """Filters; None is no filter. All given ones must hold."""

    since: datetime  # with a time zone; a request received at this moment is in the window
    until: datetime  # and at this moment no longer
    tenants: tuple[str, ...] | None = None  # None: all tenants, for officers of the platform
    subject: str | None = None  # the identity itself, or its pseudonym
    client: str | None = None
    model: str | None = None  # alias or version
    decision: str | None = None  # allow | deny
    status: str | None = None  # received | completed | denied | failed | interrupted | cancelled
    purpose: str | None = None
    guardrail: str | None = None  # id of one that found something
    limit: int = 100  # 1 … 500
    after: str | None = None  # the cursor of the slice before

    def __post_init__(self) -> None:
        for name, moment in (("from", self.since), ("to", self.until)):
            if moment.tzinfo is None or not EPOCH <= moment < LATEST:
                raise QueryRefused(f"`{name}` is not a time from 1970 to 9998 with a time zone")
        if not timedelta(0) < self.until - self.since <= MAX_WINDOW:
            raise QueryRefused("`to` is not later than `from`, or by more than ten years")
        if not 1 <= self.limit <= MAX_LIMIT:
            raise QueryRefused(f"`limit` is not 1 to {MAX_LIMIT}")
        for name in ("subject", "client", "model", "purpose", "guardrail"):
            _check_text(name, getattr(self, name))
        if self.decision not in (None, "allow", "deny"):
            raise QueryRefused("`decision` is not `allow` or `deny`")
        if self.status is not None and self.status not in STATUSES:
            raise QueryRefused(f"`status` is none of {', '.join(f'`{status}`' for status in sorted(STATUSES))}")
        if self.after is not None and not _CURSOR.fullmatch(self.after):
            raise QueryRefused("`after` is not a cursor that an earlier answer gave")


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request as a list shows it."""

    request_id: str
    tenant: str
    subject: str | None  # pseudonym
    client: str | None
    purpose: str | None
    action: str
    received_at: str  # `2026-11-20T19:43:00.123456Z`
    completed_at: str | None
    status: str
    decision: str  # allow | deny
    policy: str
    code: str | None  # the error code of a denial or failure
    model: Mapping[str, str | None]  # alias, version
    guardrails: tuple[str, ...]  # ids of those that found something
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class RequestPage:
    """A slice, newest first."""

    requests: tuple[RequestRow, ...]
    after: str | None  # cursor of the next slice; None where this is the last


# (tenant, kind, value) → pseudonym
Pseudonym = Callable[[str, str, str], str]


def statement(query: RequestQuery, tenants: tuple[str, ...], pseudonym: Pseudonym) -> Select[Any]:
    """Return the SELECT of `query` over `tenants`, which are known to exist; one row more than its limit."""
    table = request_index.c
    exact = {
        table.client: query.client,
        table.effect: query.decision,
        table.status: query.status,
        table.purpose: query.purpose,
    }
    wanted: list[ColumnElement[bool]] = [
        table.received_at >= microseconds(query.since),
        table.received_at < microseconds(query.until),
        table.tenant.in_(tenants),
        *(column == value for column, value in exact.items() if value is not None),
    ]
    if query.model is not None:
        wanted.append(or_(table.model_alias == query.model, table.model_version == query.model))
    if query.subject is not None:
        wanted.append(_is_subject(query.subject, tenants, pseudonym))
    if query.guardrail is not None:
        # The bar in front also matches a list that begins without one.
        wanted.append((literal("|") + table.guardrails).contains(f"|{query.guardrail}|", autoescape=True))
    if query.after is not None:
        wanted.append(tuple_(table.received_at, table.request_id) < tuple_(*_place(query.after)))
    order = (table.received_at.desc(), table.request_id.desc())
    return select(request_index).where(and_(*wanted)).order_by(*order).limit(query.limit + 1)


def page(query: RequestQuery, rows: list[Row[Any]]) -> RequestPage:
    """Return the slice that the rows of `statement` make."""
    shown = rows[: query.limit]
    after = f"{shown[-1].received_at}.{shown[-1].request_id}" if len(rows) > query.limit else None
    return RequestPage(tuple(map(_request_row, shown)), after)


def microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


def timestamp(moment_us: int) -> str:
    """Return microseconds since 1970 as leaves write them."""
    return (EPOCH + timedelta(microseconds=moment_us)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _check_text(name: str, value: str | None) -> None:
    if value is None:
        return
    if not 1 <= len(value) <= MAX_TEXT or not value.isprintable() or (name == "guardrail" and "|" in value):
        raise QueryRefused(f"`{name}` is not 1 to {MAX_TEXT} printable characters")


def _is_subject(subject: str, tenants: tuple[str, ...], pseudonym: Pseudonym) -> ColumnElement[bool]:
    """A person has another pseudonym in each tenant."""
    table = request_index.c
    of_tenants = [
        and_(table.tenant == tenant, table.subject == pseudonym(tenant, "subject", subject)) for tenant in tenants
    ]
    if _PSEUDONYM.fullmatch(subject):
        of_tenants.append(table.subject == subject)
    return or_(literal(False), *of_tenants)


def _place(cursor: str) -> tuple[int, str]:
    moment, _, request_id = cursor.partition(".")
    return int(moment), request_id


def _request_row(row: Row[Any]) -> RequestRow:
    return RequestRow(
        request_id=row.request_id,
        tenant=row.tenant,
        subject=row.subject,
        client=row.client,
        purpose=row.purpose,
        action=row.action,
        received_at=timestamp(row.received_at),
        completed_at=None if row.completed_at is None else timestamp(row.completed_at),
        status=row.status,
        decision=row.effect,
        policy=row.policy,
        code=row.code,
        model={"alias": row.model_alias, "version": row.model_version},
        guardrails=tuple(dict.fromkeys(filter(None, row.guardrails.split("|")))),
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
    )
