"""A change to a tenant's policy or status: decided against what the administrator saw, and on record with it.

The record and the change are one transaction (`log.append(record, within=…)`): neither is ever there without the
other. What the record says of the state (version number, digest of the effective policy) was read before; the
transaction ends unless it still holds. Knows no HTTP.

StaleGeneration (policies/store.py) and the store's other refusals pass through; LogUnavailable (audit/writer.py) says
that it is not known whether the change was made.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from audit.log import AuditLog
from audit.records import SYSTEM, Json, Record, RecordType
from gateway.oversight import Officer, change_record
from policies import store as stored
from policies.document import FLOOR_TENANT, EffectivePolicy, PolicyDocument, compose
from policies.store import PolicyStore, StaleGeneration, StoreUnavailable


@dataclass(frozen=True, slots=True)
class Change:
    """Who changes what of whom, and what they had seen."""

    officer: Officer
    tenant: str  # `*` is the floor
    reason: str
    generation: int  # that the administrator saw

    @property
    def log_tenant(self) -> str:
        return SYSTEM if self.tenant == FLOOR_TENANT else self.tenant


class PolicyChanges:
    """Makes changes. Blocking reads run beside the event loop."""

    def __init__(self, store: PolicyStore, log: AuditLog, now: Callable[[], datetime]) -> None:
        self._store = store
        self._log = log
        self._now = now

    async def draft(self, change: Change, document: PolicyDocument) -> int:
        """Store a new version and return its number. Raises: PolicyInvalid, StaleGeneration, LogError."""
        number = await asyncio.to_thread(self._next_number, change.tenant)
        canonical = document.canonical()
        says: dict[str, Json] = {"version": number, "digest": _digest(canonical), "name": document.name}
        record = _record(RecordType.POLICY_DRAFTED, change, says, {"document": canonical})

        def insert(connection: Connection) -> None:
            made = stored.insert_version(
                connection, document, self._author(change), change.reason, self._now_us(), change.generation
            )
            _still(made == number)

        await self._commit(change, record, insert)
        return number

    async def activate(self, change: Change, number: int) -> EffectivePolicy:
        """Let a version hold. Raises: NoSuchVersion, PolicyInvalid, StaleGeneration, LogError."""
        effective, floor_generation = await asyncio.to_thread(self._composed, change.tenant, number)
        record = _record(RecordType.POLICY_ACTIVATED, change, _holds(number, effective))

        def activate(connection: Connection) -> None:
            self._floor_still(connection, change, floor_generation)
            stored.activate(connection, change.tenant, number, change.generation)

        await self._commit(change, record, activate)
        return effective

    async def roll_back(self, change: Change, to: int) -> tuple[int, EffectivePolicy]:
        """Make and activate a new version equal to version `to`. Raises as `activate` does."""
        effective, floor_generation = await asyncio.to_thread(self._composed, change.tenant, to)
        number = await asyncio.to_thread(self._next_number, change.tenant)
        record = _record(RecordType.POLICY_ROLLED_BACK, change, {**_holds(number, effective), "to": to})

        def roll_back(connection: Connection) -> None:
            self._floor_still(connection, change, floor_generation)
            made = stored.roll_back(
                connection, change.tenant, to, self._author(change), change.reason, self._now_us(), change.generation
            )
            _still(made == number)

        await self._commit(change, record, roll_back)
        return number, effective

    async def suspend(self, change: Change, suspended: bool) -> None:
        """Stop or resume service to a tenant. Raises: AlreadySo, StaleGeneration, LogError."""
        says: dict[str, Json] = {"change": "tenant.suspended" if suspended else "tenant.resumed"}
        record = _record(RecordType.ACCESS_CHANGED, change, says)
        await self._commit(
            change,
            record,
            lambda connection: stored.set_suspended(connection, change.tenant, suspended, change.generation),
        )

    async def _commit(self, change: Change, record: Record, within: Callable[[Connection], None]) -> None:
        try:
            await self._log.append(record, within=within)
        finally:
            # Also where the outcome is unknown: what holds is what the database says.
            self._store.invalidate(change.tenant)
            with suppress(StoreUnavailable):  # then the follower sees it, or nothing is decided any more
                await asyncio.to_thread(self._store.refresh)  # answers in progress know of it when this returns

    # --- what is read before ---

    def _next_number(self, tenant: str) -> int:
        last = 0
        while versions := self._store.versions(tenant, after=last):
            last = versions[-1].version
        return last + 1

    def _composed(self, tenant: str, number: int) -> tuple[EffectivePolicy, int]:
        """Return what would hold, and the generation of the floor it would hold under."""
        document = self._store.version(tenant, number).document
        if tenant == FLOOR_TENANT:
            return compose(None, document), 0
        floor = self._store.state(FLOOR_TENANT)
        above = None if floor.active_version is None else self._store.version(FLOOR_TENANT, floor.active_version)
        return compose(None if above is None else above.document, document), floor.generation

    def _floor_still(self, connection: Connection, change: Change, generation: int) -> None:
        if change.tenant != FLOOR_TENANT:
            _still(stored.state(connection, FLOOR_TENANT).generation == generation)

    def _author(self, change: Change) -> str:
        return self._log.keyring.pseudonym(change.log_tenant, "subject", change.officer.principal.subject)

    def _now_us(self) -> int:
        return int(self._now().timestamp() * 1_000_000)


def _still(holds: bool) -> None:
    if not holds:
        raise StaleGeneration("the policy was changed at the same moment; read it again")


def _holds(number: int, effective: EffectivePolicy) -> dict[str, Json]:
    canonical = effective.document.canonical()
    return {
        "version": number,
        "digest": _digest(canonical),
        "effective": effective.digest,
        "name": effective.document.name,
    }


def _digest(canonical: bytes) -> str:
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def _record(type: RecordType, change: Change, says: dict[str, Json], parts: dict[str, bytes] | None = None) -> Record:
    about: dict[str, Json] = {"tenant": change.tenant, "generation": change.generation + 1, **says}
    return change_record(change.officer, type, change.log_tenant, about, change.reason, parts or {})
