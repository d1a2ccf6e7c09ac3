"""The log as the gateway holds it: opened or refused, appended to, asked how it is.

Opening checks every promise before the first record: keys, settings and defences of the database, the ratchet. Then
the orphans of writers that ended are closed, and only then does the log take anything new.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import func, select

from audit.database import Database, reading
from audit.key_check import check_keys
from audit.keys import Keyring
from audit.keystore import KeyStore
from audit.merkle import tree_root
from audit.ratchet import Ratchet
from audit.records import SYSTEM, Receipt, Record, RecordType, Segment
from audit.sequencer import node_reader
from audit.tables import checkpoint, head
from audit.trust import write_trust
from audit.writer import LogUnavailable, Within, Writer


@dataclass(frozen=True, slots=True)
class LogSettings:
    database_url: str
    keystore_url: str  # another database, with backups of its own
    keys: Path  # directory: master, pseudonym and signing key
    ratchet: Path
    trust: Path  # where the verifier keys are written for auditors
    origin: str  # e.g. `probity.local`; a tenant's log is `probity.local/acme-bank`
    append_timeout_s: float = 10.0
    low_water_bytes: int = 256 << 20  # below it, no new request is taken
    lease_s: float = 30.0  # PostgreSQL: a gateway silent for so long is fenced, and its open requests are closed
    rhythm_s: float = 0.0  # between the beginnings of a busy writer's batches, at least


@dataclass(frozen=True, slots=True)
class LogHealth:
    alive: bool
    why: str | None  # what ended it
    confirming: bool  # the database answered the last time
    queued: int
    disk_low: bool
    last_commit_age_s: float | None


OnDeath = Callable[[str], None]  # told once, on the writer's thread, why nothing can be appended any more


class AuditLog:
    """Append-only. One per process."""

    def __init__(
        self,
        settings: LogSettings,
        database: Database,
        keyring: Keyring,
        keystore: KeyStore,
        ratchet: Ratchet,
        on_death: OnDeath,
    ) -> None:
        self._settings = settings
        self.database = database
        self.keyring = keyring
        self.keystore = keystore
        self._writer = Writer(
            database,
            keyring,
            keystore,
            ratchet,
            self.origin,
            low_water_bytes=settings.low_water_bytes,
            on_new_log=self._write_trust,
            on_death=on_death,
            lease_s=settings.lease_s,
            rhythm_s=settings.rhythm_s,
        )

    @classmethod
    def open(cls, settings: LogSettings, *, create: bool = False, on_death: OnDeath = lambda why: None) -> AuditLog:
        """Open the log, close what earlier writers left open, and start to write.

        With `create`, keys and ratchet are made for a database that holds no log yet: the first start. A log that is
        there without them lost something, and is refused: new ones would hide what was cut off or rewritten.

        Raises:
            KeyRefused, DatabaseRefused, KeyStoreError, RatchetError: a promise could not be kept; each says what to do.
        """
        database = Database.open(settings.database_url)
        try:
            first = _holds_no_log(database)
            if create and first and not settings.keys.exists():
                _begin(settings)
            keyring = Keyring.load(settings.keys)
            ratchet = Ratchet.load_own(settings.ratchet)
            _check_ratchet(database, ratchet)
            keystore = KeyStore.open(settings.keystore_url, create=first)
        except BaseException:
            database.close()
            raise
        log = cls(settings, database, keyring, keystore, ratchet, on_death)
        try:
            with reading(database.reader) as connection:
                check_keys(connection, keyring, keystore, ratchet)
            log._start()
        except BaseException:
            log._release()
            raise
        return log

    def origin(self, tenant: str) -> str:
        """Return the name of a tenant's log."""
        return f"{self._settings.origin}/{tenant}"

    # --- appending ---

    async def append(self, record: Record, within: Within | None = None) -> Receipt:
        """Append one record and return once it is durable.

        When this returns, a crash of any process will not lose it. Records of one caller keep their order; concurrent
        callers share a transaction. `within` runs in the record's own transaction: what it raises undoes both.

        Raises:
            RecordTooLarge: the canonical bytes exceed 65,535.
            RecordMalformed: the record is not of its type's form.
            AlreadyClosed: a closing record for a request that is not open.
            LogUnavailable: the database did not confirm in time. The record may or may not be stored; the request it
                belongs to must not be answered.
        """
        try:
            return await self._writer.append(record, self._settings.append_timeout_s, within)
        except (TimeoutError, asyncio.CancelledError) as error:
            self._disown(record)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise LogUnavailable("the database did not confirm in time") from None

    async def journal(self, segment: Segment) -> None:
        """Return once the segment is durable.

        Raises:
            AlreadyClosed: the request is not open.
            LogUnavailable: not confirmed; the segment must not be sent.
        """
        try:
            await self._writer.journal(segment, self._settings.append_timeout_s)
        except TimeoutError:
            raise LogUnavailable("the database did not confirm in time") from None

    def append_blocking(self, record: Record, within: Within | None = None) -> Receipt:
        """`append` for a thread without an event loop: start-up and the command line."""
        return self._writer.append_blocking(record, within)

    def _disown(self, record: Record) -> None:
        """Its caller no longer waits. Should a received request still be stored, it is closed behind it."""
        if record.type is RecordType.REQUEST_RECEIVED:
            body = {"reason": "not_confirmed"}
            with suppress(LogUnavailable):  # then it is an orphan, and closed at the next start
                self._writer.append_unattended(
                    Record(RecordType.REQUEST_INTERRUPTED, record.tenant, body, record.request_id, {"output": b"[]"})
                )

    # --- state ---

    def health(self) -> LogHealth:
        committed = self._writer.last_commit
        return LogHealth(
            alive=self._writer.dead is None,
            why=self._writer.dead,
            confirming=self._writer.confirming,
            queued=self._writer.queued(),
            disk_low=self._writer.disk_low,
            last_commit_age_s=None if committed is None else max(0.0, time.time() - committed),
        )

    def close(self) -> None:
        """Write what is queued, sign the last checkpoint, and let go of the database."""
        with suppress(LogUnavailable):  # then there is nothing to say it to
            self._writer.append_blocking(Record(RecordType.WRITER_STOPPED, SYSTEM, {"writer": self._writer.id}))
        self._release()

    def _release(self) -> None:
        self._writer.close()
        self.keystore.close()
        self.database.close()

    def _start(self) -> None:
        self._writer.start()
        self._writer.append_blocking(Record(RecordType.WRITER_STARTED, SYSTEM, {"writer": self._writer.id}))
        self._writer.recover()
        self._write_trust()

    def _write_trust(self) -> None:
        with reading(self.database.reader) as connection:
            logs = connection.execute(select(head.c.log).order_by(head.c.log)).scalars().all()
        write_trust(self._settings.trust, [self.keyring.verifier(log) for log in logs])


def _begin(settings: LogSettings) -> None:
    """Make the ratchet and then the keys: nothing is signed before there are keys, so that a start that was cut off
    between the two can be begun again. Keys without a ratchet cannot come of it; they are refused."""
    if not settings.ratchet.exists():
        Ratchet.create(settings.ratchet)
    if not Ratchet.load_own(settings.ratchet).origins:
        Keyring.create(settings.keys)


def _holds_no_log(database: Database) -> bool:
    with reading(database.reader) as connection:
        return connection.execute(select(head.c.log).limit(1)).first() is None


def _check_ratchet(database: Database, ratchet: Ratchet) -> None:
    """Raise RatchetError unless every log that was ever signed is there, and extends what was signed."""
    with reading(database.reader) as connection:
        for origin in ratchet.origins:
            size = connection.execute(select(head.c.size).where(head.c.log == origin)).scalar_one_or_none() or 0
            ratchet.check(origin, size, partial(tree_root, read=node_reader(connection, origin)))
        if database.embedded:  # elsewhere, another gateway may have signed since, and holds it in a ratchet of its own
            signed = select(checkpoint.c.log, func.max(checkpoint.c.tree_size)).group_by(checkpoint.c.log)
            for origin, size in connection.execute(signed):
                ratchet.check_not_behind(origin, size)
