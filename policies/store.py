"""The policy store: every version that was accepted, which one holds, and whether a tenant is served.

Reading gives an immutable snapshot per tenant, kept in memory until `invalidate`. Writing takes a connection: the
caller brings the transaction in which the change's record is written too. Knows rows and documents, no log.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from policies.document import (
    FLOOR_TENANT,
    EffectivePolicy,
    Finding,
    PolicyDocument,
    PolicyInvalid,
    check_floor,
    compose,
    read_document,
)
from policies.tables import policy_version, tenant_state

MAX_SNAPSHOTS = 4_096  # tenants whose policy is kept in memory

# PolicyStoreError      catch this
# ├── StaleGeneration   somebody changed it since; read it again
# ├── NoSuchVersion     there is no such version
# ├── VersionDamaged    its text in the database is not what was stored; nothing is served by it
# ├── AlreadySo         it is active, suspended or resumed already
# └── StoreUnavailable  the database does not answer: nothing may be decided


class PolicyStoreError(Exception):
    """A change is refused."""


class StaleGeneration(PolicyStoreError):
    """The tenant's state is not what the caller saw."""


class NoSuchVersion(PolicyStoreError):
    """There is no such version."""


class VersionDamaged(PolicyStoreError):
    """A stored version's text does not have its digest."""


class AlreadySo(PolicyStoreError):
    """There is nothing to change."""


class StoreUnavailable(PolicyStoreError):
    """The database does not answer."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    tenant: str
    version: int
    document: PolicyDocument
    digest: str
    author: str
    reason: str
    created_at: int  # microseconds since 1970 UTC


@dataclass(frozen=True, slots=True)
class TenantState:
    tenant: str
    active_version: int | None
    suspended: bool
    generation: int  # 0 where nothing was ever stored


class PolicyStore:
    """Reads on `engine`; it is shared by all threads, its cache is replaced whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = Lock()
        self._snapshots: dict[str, tuple[EffectivePolicy | None, bool]] = {}
        self._epoch = 0  # counts invalidations

    # --- what holds now: no I/O after the first time ---

    def current(self, tenant: str) -> EffectivePolicy | None:
        """Return the tenant's policy under the floor, or None where none is active. Raises: StoreUnavailable."""
        return self._snapshot(tenant)[0]

    def suspended(self, tenant: str) -> bool:
        """Raises: StoreUnavailable."""
        return self._snapshot(tenant)[1]

    def invalidate(self, tenant: str) -> None:
        """Read anew after a change; a change of the floor concerns everybody."""
        with self._lock:
            self._epoch += 1
            kept = {} if tenant == FLOOR_TENANT else self._snapshots
            self._snapshots = {name: held for name, held in kept.items() if name != tenant}

    def _snapshot(self, tenant: str) -> tuple[EffectivePolicy | None, bool]:
        held = self._snapshots.get(tenant)
        if held is None:
            epoch = self._epoch
            try:
                with self._engine.connect() as connection:
                    held = _effective(connection, tenant), state(connection, tenant).suspended
            except SQLAlchemyError as error:
                raise StoreUnavailable("the policies cannot be read") from error
            self._keep(tenant, held, epoch)
        return held

    def _keep(self, tenant: str, held: tuple[EffectivePolicy | None, bool], epoch: int) -> None:
        """Keep what was read, unless a change came in while it was: else what is no more would hold for ever."""
        with self._lock:
            if self._epoch == epoch:
                kept = self._snapshots if len(self._snapshots) < MAX_SNAPSHOTS else {}
                self._snapshots = {**kept, tenant: held}

    # --- for administrators ---

    def state(self, tenant: str) -> TenantState:
        with self._engine.connect() as connection:
            return state(connection, tenant)

    def versions(self, tenant: str, *, after: int = 0, limit: int = 100) -> Sequence[StoredVersion]:
        """Return versions in order, from the one behind `after`; at most `limit`."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(policy_version)
                .where(policy_version.c.tenant == tenant, policy_version.c.version > after)
                .order_by(policy_version.c.version)
                .limit(limit)
            ).all()
        return [_stored(row) for row in rows]

    def version(self, tenant: str, number: int) -> StoredVersion:
        """Raises NoSuchVersion."""
        with self._engine.connect() as connection:
            return version(connection, tenant, number)


# --- reading within a transaction ---


def state(connection: Connection, tenant: str) -> TenantState:
    row = connection.execute(select(tenant_state).where(tenant_state.c.tenant == tenant)).one_or_none()
    if row is None:
        return TenantState(tenant, None, False, 0)
    return TenantState(row.tenant, row.active_version, bool(row.suspended), row.generation)


def version(connection: Connection, tenant: str, number: int) -> StoredVersion:
    """Raises NoSuchVersion."""
    row = connection.execute(
        select(policy_version).where(policy_version.c.tenant == tenant, policy_version.c.version == number)
    ).one_or_none()
    if row is None:
        raise NoSuchVersion(f"there is no version {number} of this policy")
    return _stored(row)


# --- changes: each in the caller's transaction, each against the generation the caller saw ---


def insert_version(
    connection: Connection, document: PolicyDocument, author: str, reason: str, now_us: int, generation: int
) -> int:
    """Store a new version and return its number. It holds only once it is activated.

    Raises:
        PolicyInvalid: it cannot hold under the floor; or, for a floor, a tenant's policy could not hold under it.
        StaleGeneration: see `StaleGeneration`.
    """
    tenant = document.tenant
    _check_composes(connection, document)
    last = connection.execute(
        select(func.max(policy_version.c.version)).where(policy_version.c.tenant == tenant)
    ).scalar_one()
    number = (last or 0) + 1
    _advance(connection, tenant, generation, {})
    canonical = document.canonical()
    try:
        connection.execute(
            insert(policy_version).values(
                tenant=tenant,
                version=number,
                document=canonical.decode(),
                digest="sha256:" + hashlib.sha256(canonical).hexdigest(),
                author=author,
                reason=reason,
                created_at=now_us,
            )
        )
    except IntegrityError as error:
        raise StaleGeneration("another version was stored at the same moment; read the policy again") from error
    return number


def activate(connection: Connection, tenant: str, number: int, generation: int) -> StoredVersion:
    """Let a version hold.

    Raises:
        NoSuchVersion, StaleGeneration, PolicyInvalid: see `insert_version`; the floor may have changed since.
    """
    stored = version(connection, tenant, number)
    _check_composes(connection, stored.document)
    _advance(connection, tenant, generation, {"active_version": number})
    return stored


def roll_back(
    connection: Connection, tenant: str, to: int, author: str, reason: str, now_us: int, generation: int
) -> int:
    """Make and activate a new version equal to an earlier one; return its number. Raises as the two above."""
    earlier = version(connection, tenant, to)
    number = insert_version(connection, earlier.document, author, reason, now_us, generation)
    activate(connection, tenant, number, generation + 1)
    return number


def set_suspended(connection: Connection, tenant: str, suspended: bool, generation: int) -> None:
    """Raises AlreadySo, StaleGeneration."""
    if state(connection, tenant).suspended == suspended:
        raise AlreadySo(f"the tenant is {'suspended' if suspended else 'served'} already")
    _advance(connection, tenant, generation, {"suspended": suspended})


def _advance(connection: Connection, tenant: str, generation: int, values: dict[str, object]) -> None:
    """Write `values` and the next generation, if the tenant is still at `generation`."""
    if generation == 0:
        fresh = {"tenant": tenant, "active_version": None, "suspended": False, "generation": 1} | values
        try:
            connection.execute(insert(tenant_state).values(**fresh))
        except IntegrityError as error:
            raise StaleGeneration("the policy was changed since you read it; read it again") from error
        return
    changed = connection.execute(
        update(tenant_state)
        .where(tenant_state.c.tenant == tenant, tenant_state.c.generation == generation)
        .values(generation=generation + 1, **values)
    )
    if changed.rowcount != 1:
        raise StaleGeneration("the policy was changed since you read it; read it again")


def _check_composes(connection: Connection, document: PolicyDocument) -> None:
    if document.tenant != FLOOR_TENANT:
        compose(_active(connection, FLOOR_TENANT), document)
        return
    check_floor(document)
    findings: list[Finding] = []
    tenants = connection.execute(select(tenant_state.c.tenant).where(tenant_state.c.tenant != FLOOR_TENANT)).scalars()
    for tenant in tenants.all():
        held = _active(connection, tenant)
        if held is not None:
            try:
                compose(document, held)
            except PolicyInvalid as error:
                findings += [Finding(f"{tenant}: {finding.path}", finding.message) for finding in error.findings]
    if findings:
        raise PolicyInvalid(findings)


def _active(connection: Connection, tenant: str) -> PolicyDocument | None:
    number = state(connection, tenant).active_version
    return None if number is None else version(connection, tenant, number).document


def _effective(connection: Connection, tenant: str) -> EffectivePolicy | None:
    document = _active(connection, tenant)
    return None if document is None else compose(_active(connection, FLOOR_TENANT), document)


def _stored(row: Any) -> StoredVersion:
    text: str = row.document
    if "sha256:" + hashlib.sha256(text.encode()).hexdigest() != row.digest:
        raise VersionDamaged("a stored policy version was changed outside of the gateway; restore the database")
    return StoredVersion(
        tenant=row.tenant,
        version=row.version,
        document=read_document(json.loads(text)),
        digest=row.digest,
        author=row.author,
        reason=row.reason,
        created_at=row.created_at,
    )
