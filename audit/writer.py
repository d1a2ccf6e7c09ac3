"""The writer: one thread, one connection, self-clocked group commit.

    append ─▶ queue ─▶ take all that waits ─▶ number, chain, seal ─▶ data keys durable ─▶ one transaction ─▶ waiters

There is no timer: while one batch is being made durable the next one gathers. What one turn of an event loop appends is
handed over together, at the end of the turn: a commit costs as much as ten records do, and two threads that take the
interpreter from each other for every record cost more. Where others want the processors too, a busy writer may be given
a rhythm: after a batch of several, the next begins no sooner than so long after it. When a waiter is resolved, what it
appended survives a crash. Any error fails every waiter of the batch; nothing is acknowledged that is not durable, and a
batch whose COMMIT was not answered is looked up before anything else is written.

An I/O error from the disk ends the writer for good: after a failed fsync nobody knows what is on the disk.

Owned by the thread: its connection, chains, open requests. Shared, under the condition: the queue, and what is
gathered for it.
"""

from __future__ import annotations

import asyncio
import errno
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, String, bindparam, func, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from audit.canonical import LeafError, canonical, leaf_hash
from audit.content import Random, RandomPages, SealedPart, seal, seal_transient
from audit.database import Database
from audit.identifier import NOISE_BYTES, uuid7
from audit.index import close_rows, closing_values, opening_row
from audit.journal import Durable, Orphan, clear_journal, fence, interrupted, journaled, orphans, part_name
from audit.key_supply import KeySupply
from audit.keys import Keyring
from audit.keystore import KeyStore, KeyStoreError
from audit.leaf import FIRST_PREV, Leaf, PartCommitment
from audit.ratchet import Ratchet, RatchetError
from audit.records import CLOSING, Receipt, Record, RecordType, Segment
from audit.sequencer import number_waiting, open_log, publish, unpublished
from audit.tables import chain, content, head, insert_rows, journal, leaf, request_index, run, writer

# LogError                  catch this
# ├── LogUnavailable        not confirmed; the request it belongs to must not be answered
# │   ├── LogDead           for good: the disk failed; the process must be looked at and restarted
# │   ├── LogBusy           the bounded queue is full; try again later
# │   └── DiskLow           below the low-water mark: nothing new is taken, what is open can still be closed
# ├── RecordTooLarge        the leaf would exceed 65,535 bytes, or holds what a leaf cannot
# ├── RecordMalformed       the record is not of its type's form: the caller is wrong
# └── AlreadyClosed         the request is not open: it was never received here, or has its closing record


class LogError(Exception):
    """The log refuses."""


class LogUnavailable(LogError):
    """The database did not confirm in time. The record may or may not be stored."""


class LogDead(LogUnavailable):
    """The disk failed under the log."""


class LogBusy(LogUnavailable):
    """The queue is full."""


class DiskLow(LogUnavailable):
    """There is too little disk left to take something new."""


class RecordTooLarge(LogError):
    """The record cannot be a leaf."""


class RecordMalformed(LogError):
    """The record is not of its type's form."""


class AlreadyClosed(LogError):
    """The request is not open."""


MAX_BATCH_RECORDS = 512
MAX_BATCH_BYTES = 4 << 20
MAX_QUEUED = 16_384  # entries
BUSY = 4  # entries in a batch, from which on a rhythm is kept
PUBLISH_EVERY_S = 0.5
PUBLISH_EVERY_LEAVES = 1024  # or sooner: what is numbered at once holds up who appends meanwhile
DISK_EVERY_S = 1.0
LEASE_S = 30.0
RETRIES = 3  # reconnections after a lost answer
RETRY_PAUSE_S = 0.2
RECOVERY_LOCK = 0x70726F63  # "proc": one process closes orphans at a time, on PostgreSQL
FENCED = "this writer was fenced by another; restart the process"

Within = Callable[[Connection], None]


class _WithinFailed(Exception):
    """What the caller's own statements raised, as the cause; rolled back, nothing stored."""


class _Fenced(Exception):
    """Another process ended this writer."""


@dataclass(slots=True, eq=False)
class _Entry:
    """Something queued, and who waits for it."""

    loop: asyncio.AbstractEventLoop | None
    future: asyncio.Future[Any] | None
    record: Record | None = None
    within: Within | None = None
    segment: Segment | None = None
    work: Callable[[], None] | None = None  # something else for the thread to do
    result: Any = None
    error: BaseException | None = None
    done: threading.Event | None = None

    @property
    def alone(self) -> bool:
        """Its failure is its own: it shares no transaction."""
        return self.within is not None or self.work is not None

    @property
    def size(self) -> int:
        if self.work is not None:
            return 0
        if self.segment is not None:
            return len(self.segment.data)
        assert self.record is not None
        return sum(map(len, self.record.parts.values()))


@dataclass(frozen=True, slots=True)
class _Link:
    """The end of this writer's chain in one log."""

    next_seq: int
    prev: str


@dataclass(frozen=True, slots=True)
class _OpenRequest:
    """A request that was received and has no closing record yet."""

    key_id: str
    data_key: bytes = field(repr=False)


@dataclass(slots=True)
class _Batch:
    """Rows to be written in one transaction, and the state that will hold once they are durable."""

    chains: dict[str, _Link]
    opened: dict[str, _OpenRequest]
    closed: set[str] = field(default_factory=set)  # requests
    new_logs: dict[str, str] = field(default_factory=dict)  # log → tenant
    sequences: set[tuple[str, int]] = field(default_factory=set)  # segments, by request and number
    leaves: list[dict[str, Any]] = field(default_factory=list)
    contents: list[dict[str, Any]] = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)
    openings: list[dict[str, Any]] = field(default_factory=list)
    closings: list[dict[str, Any]] = field(default_factory=list)


class Writer:
    """The thread and its queue. `start` it once; `close` waits until all that is queued is durable."""

    def __init__(
        self,
        database: Database,
        keyring: Keyring,
        keystore: KeyStore,
        ratchet: Ratchet,
        origin: Callable[[str], str],
        *,
        low_water_bytes: int,
        now: Callable[[], float] = time.time,
        random: Random | None = None,  # the system's, by the page
        on_new_log: Callable[[], None] = lambda: None,
        on_death: Callable[[str], None] = lambda why: None,
        lease_s: float = LEASE_S,
        rhythm_s: float = 0.0,  # none
    ) -> None:
        self._random = random or RandomPages()
        self._now = now
        self._database = database
        self._keyring = keyring
        self._keystore = keystore
        self._keys = KeySupply(keystore, keyring.encryption, self._random, self._new_id)
        self._ratchet = ratchet
        self._origin = origin
        self._low_water_bytes = low_water_bytes
        self._on_new_log = on_new_log
        self._on_death = on_death
        self._lease_s = lease_s
        self._rhythm_s = rhythm_s
        self._resting_until = 0.0  # monotonic
        self.id = self._random(8).hex()
        self._queue: deque[_Entry] = deque()
        self._gathered: list[_Entry] = []  # submitted after all that is in the queue, and not yet handed over
        self._condition = threading.Condition()
        self._closing = False
        self._connection: Connection | None = None
        self._chains: dict[str, _Link] = {}
        self._open: dict[str, _OpenRequest] = {}
        self._logs: set[str] = set()
        self._uncertain = False  # a batch failed: look what is stored before writing on
        self._unpublished = 0  # leaves since the last checkpoints
        self._published_at = 0.0
        self._leased_at = 0.0
        self._disk_checked_at = 0.0
        self.disk_low = False
        self.dead: str | None = None
        self.last_commit: float | None = None
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)

    # --- the callers' side: any thread ---

    def start(self) -> None:
        with self._database.writer.begin() as connection:
            self._logs = set(connection.execute(select(head.c.log)).scalars())
            moment = _us(self._now())
            connection.execute(
                insert(writer).values(id=self.id, started=moment, lease_until=moment + _us(self._lease_s), ended=None)
            )
        self._leased_at = time.monotonic()
        self._thread.start()

    def submit(self, entry: _Entry) -> None:
        """Queue an entry. Raises LogUnavailable and its kinds; then nothing was queued."""
        with self._condition:
            if self.dead is not None:
                raise LogDead(self.dead)
            if self._closing:
                raise LogUnavailable("the log is closed")
            if self.queued() >= MAX_QUEUED:
                raise LogBusy("too many records wait to be written; try again later")
            if self.disk_low and entry.record is not None and entry.record.type is RecordType.REQUEST_RECEIVED:
                raise DiskLow("the disk of the log is nearly full; free space, nothing new is taken until then")
            self._gathered.append(entry)
            if entry.loop is None:
                self._hand_over()
            elif len(self._gathered) == 1:
                entry.loop.call_soon(self._hand_over)  # after all that this turn of the loop still does

    def _hand_over(self) -> None:
        """Let the thread have what was gathered, in its order: a record may close what the one before it opened."""
        with self._condition:
            self._queue += self._gathered
            self._gathered = []
            self._condition.notify()

    async def append(self, record: Record, timeout_s: float, within: Within | None = None) -> Receipt:
        """Raises: TimeoutError: not confirmed in time; it may be stored all the same."""
        loop = asyncio.get_running_loop()
        receipt: Receipt = await self._confirmed(
            _Entry(loop, loop.create_future(), record=record, within=within), timeout_s
        )
        return receipt

    async def journal(self, segment: Segment, timeout_s: float) -> None:
        """Raises: TimeoutError: not confirmed in time; it may be stored all the same."""
        loop = asyncio.get_running_loop()
        await self._confirmed(_Entry(loop, loop.create_future(), segment=segment), timeout_s)

    async def _confirmed(self, entry: _Entry, timeout_s: float) -> Any:
        self.submit(entry)
        assert entry.loop is not None
        assert entry.future is not None
        # `asyncio.timeout` would look up task and loop anew, a system call each time, twice a request.
        late = entry.loop.call_later(timeout_s, _give_up, entry.future)
        try:
            return await entry.future
        finally:
            late.cancel()

    def append_unattended(self, record: Record) -> None:
        """Queue a record that nobody waits for. A refusal of the record itself goes unheard."""
        self.submit(_Entry(None, None, record=record))

    def append_blocking(self, record: Record, within: Within | None = None) -> Receipt:
        """Append from a thread without a loop: start-up and shut-down."""
        receipt: Receipt = self._wait(_Entry(None, None, record=record, within=within, done=threading.Event()))
        return receipt

    def recover(self) -> None:
        """Close what ended writers left open; return once that is durable. For a thread without a loop."""
        self._wait(_Entry(None, None, work=self._recover, done=threading.Event()))

    def _wait(self, entry: _Entry) -> Any:
        self.submit(entry)
        assert entry.done is not None
        entry.done.wait()
        if entry.error is not None:
            raise entry.error
        return entry.result

    def queued(self) -> int:
        return len(self._queue) + len(self._gathered)

    @property
    def confirming(self) -> bool:
        """Whether the database confirmed what it was last asked to keep; where it did not, it is asked again soon."""
        return not self._uncertain

    def close(self) -> None:
        """Write what is queued, publish, and end the thread."""
        with self._condition:
            self._closing = True
            self._hand_over()
        if self._thread.is_alive():
            self._thread.join()

    # --- the thread ---

    def _run(self) -> None:
        try:
            while (entries := self._take()) is not None:
                if entries:
                    self._write(entries)
                self._housekeep()
            self._end()
        except BaseException as error:  # a bug of ours must not leave waiters hanging
            self._die(f"the audit writer failed: {type(error).__name__}")
            raise
        finally:
            self._let_go()

    def _take(self) -> list[_Entry] | None:
        """Return what waits, up to one batch; an empty list when it is time to housekeep; None at the end.

        An entry that is `alone` is a batch of its own.
        """
        rest_s = self._resting_until - time.monotonic()
        if rest_s > 0:
            time.sleep(rest_s)
        with self._condition:
            if not self._queue and not self._closing:
                self._condition.wait(PUBLISH_EVERY_S)
            if not self._queue:
                self._hand_over()  # of a loop that ended with its turn
            if not self._queue:
                return None if self._closing else []
            entries: list[_Entry] = []
            size = 0
            while self._queue and len(entries) < MAX_BATCH_RECORDS and size < MAX_BATCH_BYTES:
                if self._queue[0].alone and entries:
                    break
                entry = self._queue.popleft()
                entries.append(entry)
                size += entry.size
                if entry.alone:
                    break
            self._resting_until = time.monotonic() + self._rhythm_s if len(entries) >= BUSY else 0.0
            return entries

    def _write(self, entries: list[_Entry]) -> None:
        """Do what the entries ask and wake their waiters, whatever happens."""
        try:
            if self._uncertain:
                self._settle_uncertainty()
            if entries[0].work is not None:
                entries[0].work()
            else:
                self._write_batch(entries)
        except _WithinFailed as failed:
            entries[0].error = failed.__cause__
        except _Fenced:
            self._die(FENCED)
            self._fail(entries, LogDead(FENCED))
        except (SQLAlchemyError, KeyStoreError, OSError, LogError) as error:
            self._fail(entries, error)
        except BaseException as error:
            self._fail(entries, LogUnavailable(f"the audit writer failed: {type(error).__name__}"))
            raise
        finally:
            self._resolve(entries)

    def _write_batch(self, entries: list[_Entry]) -> None:
        batch = _Batch(dict(self._chains), dict(self._open))
        for entry in entries:
            try:
                self._prepare(entry, batch)
            except LogError as refused:
                entry.error = refused
        self._commit(batch, entries[0].within if entries[0].error is None else None)

    # --- preparing: numbers, chains, commitments; nothing is written yet ---

    def _prepare(self, entry: _Entry, batch: _Batch) -> None:
        if entry.segment is not None:
            self._prepare_segment(entry.segment, batch)
            return
        assert entry.record is not None
        record = entry.record
        log = self._origin(record.tenant)
        _check(record, log)
        if log not in self._logs and log not in batch.new_logs:
            batch.new_logs[log] = record.tenant
            self._prepare_record(Record(RecordType.LOG_OPENED, record.tenant, {"origin": log}), log, batch)
        entry.result = self._prepare_record(record, log, batch)

    def _prepare_record(self, record: Record, log: str, batch: _Batch) -> Receipt:
        """Take the record into the batch, whole or not at all."""
        moment = self._now()
        record_id = self._new_id()
        link = batch.chains.get(log, _Link(0, FIRST_PREV))
        try:
            request = self._request_of(record, batch)
            sealed = self._seal(record, record_id, request)
            new = self._leaf(record, log, link, record_id, moment, sealed)
            encoded = new.encode()
            rows = _IndexRows.of(new, record.tenant, request.key_id, _us(moment))
        except LeafError as error:
            raise RecordTooLarge(str(error)) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordMalformed(f"the record is not a `{record.type.value}`; build it with audit.records") from error
        # From here on nothing fails.
        digest = leaf_hash(encoded)
        batch.chains[log] = _Link(link.next_seq + 1, digest.hex())
        batch.leaves.append(_leaf_row(new, encoded, digest, _us(moment)))
        batch.contents.extend(_content_row(new, request.key_id, name, part) for name, part in sealed.items())
        batch.openings.extend(rows.opening)
        batch.closings.extend(rows.closing)
        self._follow(record, request, batch)
        return Receipt(log, self.id, link.next_seq, digest.hex())

    def _seal(self, record: Record, record_id: str, request: _OpenRequest) -> dict[str, SealedPart]:
        parts = dict(record.parts)
        if record.identities:
            parts["identities"] = canonical(dict(record.identities))
        return {
            name: seal(request.data_key, record.tenant, record_id, name, plaintext, self._random)
            for name, plaintext in parts.items()
        }

    def _leaf(
        self, record: Record, log: str, link: _Link, record_id: str, moment: float, sealed: Mapping[str, SealedPart]
    ) -> Leaf:
        return Leaf(
            log=log,
            writer=self.id,
            writer_seq=link.next_seq,
            prev=link.prev,
            record=record_id,
            type=record.type,
            time=_iso(moment),
            nonce=self._random(16).hex(),
            body=record.body,
            request=record.request_id,
            parts=[PartCommitment(name, part.com.hex(), part.ct.hex()) for name, part in sealed.items()],
            identities={
                kind: self._keyring.pseudonym(record.tenant, kind, value) for kind, value in record.identities.items()
            },
        )

    def _new_id(self) -> str:
        return uuid7(int(self._now() * 1000), self._random(NOISE_BYTES))

    def _request_of(self, record: Record, batch: _Batch) -> _OpenRequest:
        """Return the data key to seal with: the open request's, or a fresh one; none where nothing is sealed."""
        request = batch.opened.get(record.request_id or "")
        if record.type in CLOSING:
            if request is None or record.request_id in batch.closed:
                raise AlreadyClosed("the request is not open here: it was closed, or never received")
            return request
        if record.type in _OPENS_KEY and request is not None:
            raise RecordMalformed("the request was received already; every request has an id of its own")
        if record.type in _OPENS_KEY or record.parts or record.identities:
            fresh = self._keys.take(record.tenant)
            return _OpenRequest(fresh.id, fresh.key)
        return _OpenRequest("", b"")

    def _follow(self, record: Record, request: _OpenRequest, batch: _Batch) -> None:
        if record.request_id is None:
            return
        if record.type in CLOSING:
            batch.closed.add(record.request_id)
        elif record.type is RecordType.REQUEST_RECEIVED:
            batch.opened[record.request_id] = request

    def _prepare_segment(self, segment: Segment, batch: _Batch) -> None:
        request = batch.opened.get(segment.request_id)
        if request is None or segment.request_id in batch.closed:
            raise AlreadyClosed("the request is not open here: it was closed, or never received")
        part = part_name(segment.sequence)
        sealed = seal_transient(request.data_key, segment.tenant, segment.request_id, part, segment.data, self._random)
        if not 0 <= segment.sequence < 1 << 63 or (segment.request_id, segment.sequence) in batch.sequences:
            raise RecordMalformed("a segment has a sequence number of its own in its request")
        batch.sequences.add((segment.request_id, segment.sequence))
        batch.segments.append(
            {
                "request_id": segment.request_id,
                "sequence": segment.sequence,
                "choice": segment.choice,
                "sealed": sealed,
            }
        )

    # --- committing ---

    def _commit(self, batch: _Batch, within: Within | None) -> None:
        """Make the batch durable, or raise. Then this writer's state is the batch's."""
        if batch.leaves or batch.segments:
            self._keys.store()
            try:
                self._transact(batch, within)
            except DBAPIError as error:
                if within is not None or not error.connection_invalidated:
                    raise
                self._commit_again(batch)  # the answer to COMMIT may be lost
            self.last_commit = self._now()
        self._chains = batch.chains
        self._open = {key: value for key, value in batch.opened.items() if key not in batch.closed}
        self._unpublished += len(batch.leaves)
        if batch.new_logs:
            self._logs |= batch.new_logs.keys()
            self._on_new_log()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Yield the thread's connection in a transaction. It is kept: what a pool does to hand one out, and to have it
        back, takes as long as writing a segment. After a failure the pool looks at it, or makes another."""
        connection = self._connection = self._connection or self._database.writer.connect()
        try:
            with connection.begin():
                yield connection
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """Give the connection back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _transact(self, batch: _Batch, within: Within | None) -> None:
        with self._transaction() as connection:
            self._check_fence(connection)
            if within is not None:
                _run_within(within, connection)
            # Logs in their order, here and in the sequencer: locks are taken in one order, so that nobody waits in a
            # ring.
            for log, tenant in sorted(batch.new_logs.items()):
                open_log(connection, log, tenant)
            insert_rows(connection, leaf, batch.leaves)
            insert_rows(connection, content, batch.contents)
            insert_rows(connection, journal, batch.segments)
            insert_rows(connection, request_index, batch.openings)
            if batch.closings:
                close_rows(connection, batch.closings)
                clear_journal(connection, [row["at_request"] for row in batch.closings])
            self._keep_chains(connection, batch.leaves)

    def _check_fence(self, connection: Connection) -> None:
        """Hold off whoever would end this writer until the transaction is over; raise where it was ended.

        An embedded log needs none: its lock file ends with its process.
        """
        if self._database.embedded:
            return
        alive = select(writer.c.id).where(writer.c.id == self.id, writer.c.ended.is_(None)).with_for_update(read=True)
        if connection.execute(alive).scalar_one_or_none() is None:
            raise _Fenced

    def _keep_chains(self, connection: Connection, leaves: Sequence[dict[str, Any]]) -> None:
        """Note how far the chains have come."""
        by_log: dict[str, list[dict[str, Any]]] = {}
        for row in leaves:
            by_log.setdefault(row["log"], []).append(row)
        for log, rows in sorted(by_log.items()):
            appended = rows[-1]["writer_seq"] + 1
            values = {"at_log": log, "at_writer": self.id, "appended": appended}
            if rows[0]["writer_seq"] == 0:
                connection.execute(insert(chain).values(log=log, writer=self.id, appended=appended, numbered=0))
            else:
                run(connection, _APPENDED, values)

    def _commit_again(self, batch: _Batch) -> None:
        """The connection broke: find out whether the batch is stored; if it is not, store the same bytes once."""
        for _ in range(RETRIES):
            time.sleep(RETRY_PAUSE_S)
            try:
                if not self._is_stored(batch):
                    self._transact(batch, None)
            except IntegrityError:
                # The lost transaction was still being committed when it was looked for.
                if not self._is_stored(batch):
                    raise
                return
            except OperationalError as error:
                if _disk_failed(error):
                    raise
            else:
                return
        raise LogUnavailable("the database does not answer")

    def _is_stored(self, batch: _Batch) -> bool:
        """A batch is one transaction: its last row stands for all."""
        with self._transaction() as connection:
            if batch.leaves:
                last = batch.leaves[-1]
                found = connection.execute(select(leaf.c.leaf_hash).where(leaf.c.record_id == last["record_id"]))
                return found.scalar_one_or_none() is not None
            last = batch.segments[-1]
            return (
                connection.execute(
                    select(journal.c.choice).where(
                        journal.c.request_id == last["request_id"], journal.c.sequence == last["sequence"]
                    )
                ).scalar_one_or_none()
                is not None
            )

    # --- failing ---

    def _fail(self, entries: list[_Entry], error: Exception) -> None:
        self._uncertain = True
        if _disk_failed(error):
            self._die("the disk failed under the log; check it, verify the log, then restart")
        for entry in entries:
            if entry.error is None:
                entry.error = LogDead(self.dead) if self.dead is not None else _unavailable(error)

    def _settle_uncertainty(self) -> None:
        """After a failure: take up the chains as they are stored. Raises where the database still does not answer."""
        with self._transaction() as connection:
            self._chains = _stored_chains(connection, self.id)
            self._logs = set(connection.execute(select(head.c.log)).scalars())
            open_ids = connection.execute(
                select(request_index.c.request_id, request_index.c.tenant, request_index.c.key_id).where(
                    request_index.c.writer == self.id, request_index.c.status == "received"
                )
            ).all()
        self._uncertain = False
        self._close_strays([Orphan(*row) for row in open_ids if row[0] not in self._open])
        self._open = {row[0]: self._open[row[0]] for row in open_ids if row[0] in self._open}

    def _recover(self) -> None:
        """Close what ended writers left open. One process at a time: the others find nothing left to do."""
        with self._database.writer.begin() as connection:
            fence(connection, self.id, _us(self._now()), sole_writer=self._database.embedded)
        with self._database.writer.begin() as connection:
            left_open = orphans(connection) if self._may_recover(connection) else []
            found = [(orphan, journaled(connection, orphan, self._data_key(orphan))) for orphan in left_open]
            if not self._database.embedded:
                self._close_orphans(found)  # under the lock
        if self._database.embedded:
            self._close_orphans(found)

    def _may_recover(self, connection: Connection) -> bool:
        if self._database.embedded:
            return True
        held: bool = connection.execute(select(func.pg_try_advisory_xact_lock(RECOVERY_LOCK))).scalar_one()
        return held

    def _data_key(self, orphan: Orphan) -> bytes:
        return self._keyring.encryption.unwrap(orphan.tenant, self._keystore.get(orphan.key_id).wrapped)

    def _close_orphans(self, found: Sequence[tuple[Orphan, Durable]]) -> None:
        for orphan, durable in found:
            self._adopt(orphan)
            self._close_now(interrupted(orphan, durable))

    def _close_now(self, record: Record) -> None:
        batch = _Batch(dict(self._chains), dict(self._open))
        self._prepare(_Entry(None, None, record=record), batch)
        self._commit(batch, None)

    def _close_strays(self, strays: Iterable[Orphan]) -> None:
        """Close requests that were stored although their caller was told that they were not: nothing was generated."""
        for stray in strays:
            self._adopt(stray)
            body = {"reason": "not_confirmed"}
            record = Record(RecordType.REQUEST_INTERRUPTED, stray.tenant, body, stray.request_id, {"output": b"[]"})
            self._close_now(record)

    def _adopt(self, orphan: Orphan) -> None:
        """Take over an open request, of a writer that ended or our own."""
        self._open[orphan.request_id] = _OpenRequest(orphan.key_id, self._data_key(orphan))

    def _die(self, why: str) -> None:
        with self._condition:
            first = self.dead is None
            self.dead = self.dead or why
            self._hand_over()
            waiting, self._queue = list(self._queue), deque()
        for entry in waiting:
            entry.error = LogDead(why)
        self._resolve(waiting)
        if first:
            self._on_death(why)

    def _resolve(self, entries: list[_Entry]) -> None:
        """Wake the waiters: one call a loop, however many there are."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Entry]] = {}
        for entry in entries:
            if entry.done is not None:
                entry.done.set()
            if entry.loop is not None:
                by_loop.setdefault(entry.loop, []).append(entry)
        for loop, waiting in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, waiting)

    # --- between batches ---

    def _housekeep(self) -> None:
        now = time.monotonic()
        if now - self._disk_checked_at >= DISK_EVERY_S:
            self._disk_checked_at = now
            free = self._database.disk_free()
            self.disk_low = free is not None and free < self._low_water_bytes
        due = now - self._published_at >= PUBLISH_EVERY_S and (self._unpublished or not self._database.embedded)
        if due or self._unpublished >= PUBLISH_EVERY_LEAVES:
            self._published_at = now
            self._attempt(self._publish)
        if now - self._leased_at >= self._lease_s / 3:
            self._leased_at = now
            self._attempt(self._renew_lease)
            if not self._database.embedded:
                self._attempt(self._recover)

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do what is repeated soon anyway; a failure is seen in `health` by its lag, a failed disk ends the writer."""
        if self.dead is not None:
            return
        try:
            if self._uncertain:
                self._settle_uncertainty()
            work()
        except _Fenced:
            self._die(FENCED)
        except (SQLAlchemyError, RatchetError, KeyStoreError, LogError, OSError) as error:
            self._uncertain = True
            if _disk_failed(error) or isinstance(error, RatchetError):
                self._die("the log and its ratchet cannot be kept; check the disk, verify the log, then restart")

    def _publish(self) -> None:
        more = True
        while more:
            with self._transaction() as connection:
                more = number_waiting(connection)
        with self._transaction() as connection:
            due = unpublished(connection)
            if due:
                publish(connection, due, self._keyring.signer, self._ratchet, _us(self._now()))
        self._unpublished = 0

    def _renew_lease(self) -> None:
        with self._transaction() as connection:
            until = _us(self._now() + self._lease_s)
            renewed = connection.execute(
                update(writer).where(writer.c.id == self.id, writer.c.ended.is_(None)).values(lease_until=until)
            )
        if renewed.rowcount != 1:
            raise _Fenced

    def _end(self) -> None:
        if self.dead is None:
            self._attempt(self._publish)
            self._attempt(self._keys.destroy_rest)
            self._attempt(self._end_lease)

    def _end_lease(self) -> None:
        with self._transaction() as connection:
            connection.execute(update(writer).where(writer.c.id == self.id).values(ended=_us(self._now())))


# Record types whose data key is stored under the request's id; others have one under their own record's.
_OPENS_KEY = frozenset({RecordType.REQUEST_RECEIVED, RecordType.REQUEST_DENIED})

# Texts that stand in a column: the longest each may be. PostgreSQL would refuse the whole batch for one of them.
_INDEX_TEXTS = {c.name: c.type.length for c in request_index.columns if isinstance(c.type, String) and c.type.length}
_MAX_TENANT = 128
_MAX_ORIGIN = 255
_MAX_ID = 36
_MAX_PART_NAME = 64
_PART_NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True, slots=True)
class _IndexRows:
    """What a leaf says to the officers' index: at most one row."""

    opening: list[dict[str, Any]]
    closing: list[dict[str, Any]]

    @classmethod
    def of(cls, new: Leaf, tenant: str, key_id: str, moment: int) -> _IndexRows:
        opening = [opening_row(new, tenant, key_id, moment)] if new.type in _OPENS_KEY else []
        closing = [closing_values(new, moment)] if new.type in CLOSING else []
        for row in (*opening, *closing):
            for name, value in row.items():
                if type(value) is str and (len(value) > _INDEX_TEXTS.get(name, len(value)) or "\0" in value):
                    _check_text(name, value, _INDEX_TEXTS.get(name))
        return cls(opening, closing)


def _check(record: Record, log: str) -> None:
    """Raise RecordMalformed for names that the database would refuse, and with them everybody else's records."""
    _check_text("tenant", record.tenant, _MAX_TENANT)
    _check_text("log", log, _MAX_ORIGIN)
    _check_text("request_id", record.request_id, _MAX_ID)
    for name in record.parts:
        if not _PART_NAME.fullmatch(name) or len(name) > _MAX_PART_NAME:
            raise RecordMalformed("a part's name is `[a-z0-9_]+`, at most 64 characters")
    if (record.type in CLOSING or record.type in _OPENS_KEY) and record.request_id is None:
        raise RecordMalformed(f"a `{record.type.value}` belongs to a request; give its `request_id`")


def _check_text(name: str, value: object, longest: int | None) -> None:
    if not isinstance(value, str):
        return
    if "\0" in value or (longest is not None and len(value) > longest):
        raise RecordMalformed(f"`{name}` is longer than {longest} characters, or holds a zero byte")
    if not value.isascii() and value.encode("utf-8", "replace").decode() != value:
        raise RecordMalformed(f"`{name}` holds a lone surrogate")


def _leaf_row(new: Leaf, encoded: bytes, digest: bytes, moment: int) -> dict[str, Any]:
    return {
        "log": new.log,
        "writer": new.writer,
        "writer_seq": new.writer_seq,
        "leaf_hash": digest,
        "bytes": encoded,
        "record_id": new.record,
        "request_id": new.request,
        "type": new.type.value,
        "time": moment,
    }


def _content_row(new: Leaf, key_id: str, name: str, part: SealedPart) -> dict[str, Any]:
    return {
        "record_id": new.record,
        "part": name,
        "log": new.log,
        "key_id": key_id,
        "nonce": part.nonce,
        "ciphertext": part.ciphertext,
    }


def _run_within(within: Within, connection: Connection) -> None:
    try:
        within(connection)
    except Exception as error:
        raise _WithinFailed from error


_APPENDED = (
    update(chain)
    .where(chain.c.log == bindparam("at_log"), chain.c.writer == bindparam("at_writer"))
    .values(appended=bindparam("appended"))
)


def _stored_chains(connection: Connection, writer_id: str) -> dict[str, _Link]:
    last = (
        select(leaf.c.log, func.max(leaf.c.writer_seq).label("seq"))
        .join(chain, (chain.c.log == leaf.c.log) & (chain.c.writer == leaf.c.writer))
        .where(leaf.c.writer == writer_id)
        .group_by(leaf.c.log)
        .subquery()
    )
    rows = connection.execute(
        select(leaf.c.log, leaf.c.writer_seq, leaf.c.leaf_hash).join(
            last, (leaf.c.log == last.c.log) & (leaf.c.writer == writer_id) & (leaf.c.writer_seq == last.c.seq)
        )
    ).all()
    return {log: _Link(seq + 1, bytes(digest).hex()) for log, seq, digest in rows}


def _give_up(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _settle(waiting: list[_Entry]) -> None:
    for entry in waiting:
        future = entry.future
        if future is None or future.done():  # its caller gave up
            continue
        if entry.error is not None:
            future.set_exception(entry.error)
        else:
            future.set_result(entry.result)


def _unavailable(error: Exception) -> LogUnavailable:
    if isinstance(error, LogUnavailable):
        return error
    unavailable = LogUnavailable("the database did not confirm")
    unavailable.__cause__ = error
    return unavailable


def _disk_failed(error: BaseException) -> bool:
    """Tell a disk that failed, after which nothing can be believed, from one that is full or a server that is away."""
    original = getattr(error, "orig", None) or error.__cause__ or error
    original = getattr(original, "orig", None) or original
    name = getattr(original, "sqlite_errorname", "")
    # PostgreSQL: 58030 is an I/O error, XX001 and XX002 are corrupted data; it PANICs when an fsync fails.
    severity = getattr(getattr(original, "diag", None), "severity_nonlocalized", None)
    return (
        getattr(original, "errno", None) == errno.EIO
        or name.startswith("SQLITE_IOERR")
        or name in ("SQLITE_CORRUPT", "SQLITE_NOTADB")
        or getattr(original, "sqlstate", None) in ("58030", "XX001", "XX002")
        or severity == "PANIC"
    )


def _us(seconds: float) -> int:
    return round(seconds * 1_000_000)


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(_us(moment) / 1_000_000, UTC).isoformat(timespec="microseconds")[:-6] + "Z"
