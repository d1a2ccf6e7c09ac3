"""The policy store: every version that was accepted, which one holds, and whether a tenant is served.

Reading gives an immutable standing per tenant, kept in memory until something changes: here, which `invalidate` says,
or at another gateway on the same database, which `refresh` finds. Who keeps refreshing is follower.py; once it does,
what is remembered is good for a bounded time, and then nothing is decided: StoreUnavailable. Writing takes a
connection: the caller brings the transaction in which the change's record is written too.

Knows rows and documents, no log.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

MAX_STANDINGS = 4_096  # tenants whose policy is kept in memory

# PolicyStoreError      catch this
# ├── StaleGeneration   somebody changed it since; read it again
# ├── NoSuchVersion     there is no such version
# ├── AlreadySo         it is active, suspended or resumed already
# └── StoreUnavailable  the database does not answer, or has not for too long: nothing may be decided
#     └── VersionDamaged  a version's text in the database is not what was stored or activated; nothing is served by it


class PolicyStoreError(Exception):
    """A change is refused."""


class StaleGeneration(PolicyStoreError):
    """The tenant's state is not what the caller saw."""


class NoSuchVersion(PolicyStoreError):
    """There is no such version."""


class AlreadySo(PolicyStoreError):
    """There is nothing to change."""


class StoreUnavailable(PolicyStoreError):
    """The database does not answer."""


class VersionDamaged(StoreUnavailable):
    """A stored version's text does not have its digest, or not the one that was activated."""


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


# (connection, tenant) → version and digest of what was activated last, as it is on record
OnRecord = Callable[[Connection, str], tuple[int, str] | None]


@dataclass(frozen=True, slots=True)
class Standing:
    """What holds for a tenant: a request keeps the one that it started with."""

    policy: EffectivePolicy | None  # under the floor; None where none is active
    suspended: bool


class PolicyStore:
    """Reads on `engine`; it is shared by all threads, its cache is replaced whole."""

    def __init__(
        self, engine: Engine, monotonic: Callable[[], float] = time.monotonic, on_record: OnRecord | None = None
    ) -> None:
        """`on_record` says what was activated: who edits a version can edit its digest, and not what was recorded of
        it. What holds is held against it whenever it is read; without it, against its own digest only."""
        self._engine = engine
        self._on_record = on_record
        self._monotonic = monotonic
        self._lock = Lock()
        self._refreshing = Lock()  # held over a read: an older state never comes after a newer one
        self._standings: dict[str, Standing] = {}
        self._epoch = 0  # counts changes that came in
        self._good_until: float | None = None  # monotonic seconds; None: nobody refreshes, `invalidate` says it all
        self._seen: tuple[int, int] | None = None  # how many tenants have a state, and all their changes
        self._generations: dict[str, int] = {}  # as they were seen
        self._suspended: frozenset[str] = frozenset()  # as they were seen
        self._newly_suspended: frozenset[str] = frozenset()
        self.news: Callable[[], None] = lambda: None  # called where something changed here; set by who refreshes

    # --- what holds now, from memory: for the event loop ---

    def held(self, tenant: str) -> Standing | None:
        """Return the tenant's standing if it is remembered. No I/O. Raises: StoreUnavailable."""
        self._check_fresh()
        return self._standings.get(tenant)

    def suspended_meanwhile(self, tenant: str) -> bool:
        """Whether a tenant that is being answered is suspended by now. No I/O. Raises: StoreUnavailable."""
        self._check_fresh()
        held = self._standings.get(tenant)
        return tenant in self._suspended if held is None else held.suspended

    @property
    def fresh(self) -> bool:
        """Whether what is remembered may be decided by."""
        return self._good_until is None or self._monotonic() < self._good_until

    def _check_fresh(self) -> None:
        if not self.fresh:
            raise StoreUnavailable("the policies were not confirmed for too long")

    # --- what holds now: no I/O after the first time ---

    def standing(self, tenant: str) -> Standing:
        """Raises: StoreUnavailable, of which VersionDamaged is one kind."""
        held = self.held(tenant)
        if held is None:
            epoch = self._epoch
            try:
                with _one_state(self._engine) as connection:
                    held = Standing(self._effective(connection, tenant), state(connection, tenant).suspended)
            except SQLAlchemyError as error:
                raise StoreUnavailable("the policies cannot be read") from error
            self._keep(tenant, held, epoch)
        return held

    def current(self, tenant: str) -> EffectivePolicy | None:
        """Return the policy of the tenant's standing."""
        return self.standing(tenant).policy

    def suspended(self, tenant: str) -> bool:
        return self.standing(tenant).suspended

    def _effective(self, connection: Connection, tenant: str) -> EffectivePolicy | None:
        document = self._attested(connection, tenant)
        return None if document is None else compose(self._attested(connection, FLOOR_TENANT), document)

    def _attested(self, connection: Connection, tenant: str) -> PolicyDocument | None:
        """Return the active document, which is the one that the last record of an activation names."""
        number = state(connection, tenant).active_version
        if number is None:
            return None
        held = version(connection, tenant, number)
        if self._on_record is not None and self._on_record(connection, tenant) != (number, held.digest):
            raise VersionDamaged("the active policy is not the one whose activation is on record; restore the database")
        return held.document

    def _keep(self, tenant: str, held: Standing, epoch: int) -> None:
        """Keep what was read, unless a change came in while it was: else what is no more would hold for ever."""
        with self._lock:
            if self._epoch == epoch:
                kept = self._standings if len(self._standings) < MAX_STANDINGS else {}
                self._standings = {**kept, tenant: held}

    # --- what changed ---

    def invalidate(self, tenant: str) -> None:
        """Read anew after a change; a change of the floor concerns everybody."""
        self._forget({tenant})
        self.news()

    def refresh(self, good_for_s: float | None = None) -> None:
        """See what changed anywhere, and forget what it concerns.

        With `good_for_s`, what is remembered from now on may be decided by for so many seconds, and for none after.

        Cost: one row, where nothing changed; where something did, a row a tenant.

        Raises: StoreUnavailable.
        """
        with self._refreshing:
            self._refresh(good_for_s)

    def newly_suspended(self) -> frozenset[str]:
        """Return the tenants that were seen to be suspended since this was asked the last time."""
        with self._lock:
            newly, self._newly_suspended = self._newly_suspended, frozenset()
        return newly

    def _refresh(self, good_for_s: float | None) -> None:
        asked = self._monotonic()
        try:
            with self._engine.connect() as connection, connection.begin():
                # A generation only grows, and a state is never removed: where the sum is the same, all of them are.
                count, changes = connection.execute(_CHANGES).one()
                seen = int(count), int(changes)
                rows = [] if seen == self._seen else connection.execute(_STATES).all()
        except SQLAlchemyError as error:
            raise StoreUnavailable("the policies cannot be read") from error
        if seen != self._seen:
            self._take_over(seen, rows)
        if good_for_s is not None:
            self._good_until = asked + good_for_s

    def _take_over(self, seen: tuple[int, int], rows: Sequence[Any]) -> None:
        before, known = self._suspended, self._generations
        self._generations = {row.tenant: row.generation for row in rows}
        self._suspended = frozenset(row.tenant for row in rows if row.suspended)
        self._forget({tenant for tenant, number in self._generations.items() if known.get(tenant) != number})
        self._seen = seen
        with self._lock:
            self._newly_suspended |= self._suspended - before

    def _forget(self, tenants: set[str]) -> None:
        with self._lock:
            self._epoch += 1
            kept = {} if FLOOR_TENANT in tenants else self._standings
            self._standings = {name: held for name, held in kept.items() if name not in tenants}

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


@contextmanager
def _one_state(engine: Engine) -> Iterator[Connection]:
    """Yield a connection on which all statements see one state: what holds and what is on record change together."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            yield connection
        return
    with engine.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN")  # the driver begins by itself only before a write
        yield connection


_CHANGES = select(func.count(), func.coalesce(func.sum(tenant_state.c.generation), 0))
_STATES = select(tenant_state.c.tenant, tenant_state.c.generation, tenant_state.c.suspended)


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
