"""Who watched the watchers: the records that an officer's own looks and acts leave in the log. Pure but for `put`.

A look goes on record in the log of each tenant whose records it returns, before they are returned. One that returns
none is on record where the officer belongs: in its tenant's log, or in the platform's.

The body of an `audit.read`, complete:

    {"actor":{"issuer":"https://id.acme.example","roles":["auditor"]},"filters":{"from":"2026-11-01T00:00:00.000000Z",
     "status":"denied","to":"2026-12-01T00:00:00.000000Z"},"rows":17,"view":"requests"}

Nothing that an officer can type freely stands in a body, because leaves cannot be erased: reasons are an encrypted
part, so are cases and filters on names (`typed`, a JSON object: a client may be typed as somebody's address), and a
person who is asked about is an identity, like the officer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import orjson

from audit.log import AuditLog
from audit.records import SYSTEM, Json, Record, RecordType
from audit.writer import LogError
from gateway import errors
from gateway.auth.claims import PLATFORM
from policies.request import Principal


@dataclass(frozen=True, slots=True)
class Officer:
    """Who acts, and from where."""

    principal: Principal
    source: str | None  # the client's address

    @property
    def home(self) -> str:
        """The tenant whose log knows of acts that concern no one else."""
        return SYSTEM if self.principal.tenant == PLATFORM else self.principal.tenant

    @property
    def entry(self) -> dict[str, Json]:
        return {"issuer": self.principal.issuer, "roles": sorted(self.principal.roles)}

    @property
    def identities(self) -> dict[str, str]:
        source = {} if self.source is None else {"source": self.source}
        return {"subject": self.principal.subject} | source


def read_record(
    officer: Officer,
    tenant: str,
    view: str,
    filters: Mapping[str, Json],
    rows: int,
    asked_about: str | None = None,
    typed: Mapping[str, str] | None = None,
    outcome: str | None = None,
) -> Record:
    """Return the `audit.read` of a look at `rows` rows of `tenant`.

    `filters` are of forms that hold no names; `typed` are the others. `asked_about` is the person a filter names;
    `outcome` the code of the error where the look was refused.
    """
    named = {} if asked_about is None else {"asked_about": asked_about}
    body: dict[str, Json] = {"actor": officer.entry, "view": view, "filters": dict(filters), "rows": rows}
    if outcome is not None:
        body["outcome"] = outcome
    parts = {"typed": orjson.dumps(dict(typed))} if typed else {}
    return Record(RecordType.AUDIT_READ, tenant, body, parts=parts, identities=officer.identities | named)


def revealed_record(officer: Officer, tenant: str, request_id: str, reason: str, case: str | None) -> Record:
    body: dict[str, Json] = {"actor": officer.entry, "request": request_id}
    parts = {"reason": reason.encode()} | ({} if case is None else {"case": case.encode()})
    return Record(RecordType.AUDIT_REVEALED, tenant, body, parts=parts, identities=officer.identities)


def replayed_record(officer: Officer, tenant: str, request_id: str, outcome: Mapping[str, Json]) -> Record:
    body: dict[str, Json] = {"actor": officer.entry, "request": request_id, **outcome}
    return Record(RecordType.REPLAY_PERFORMED, tenant, body, identities=officer.identities)


def change_record(
    officer: Officer, type: RecordType, tenant: str, change: Mapping[str, Json], reason: str, parts: Mapping[str, bytes]
) -> Record:
    """Return the record of a change that an administrator makes, with what it consists of."""
    body: dict[str, Json] = {"actor": officer.entry, **change}
    return Record(type, tenant, body, parts={"reason": reason.encode(), **parts}, identities=officer.identities)


async def put(log: AuditLog, records: Iterable[Record]) -> None:
    """Return once every record is durable. Raises: ApiError (503); then nothing may be shown."""
    outcomes = await asyncio.gather(*(log.append(record) for record in records), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, LogError):
            raise errors.audit_unavailable()
        if isinstance(outcome, BaseException):
            raise outcome
