"""Recompute a log from its rows to its root, and name the first leaf that is wrong.

In the order of the leaves: the index is dense; the bytes have the stored hash, are canonical, and say what the row's
columns say; `writer_seq` is dense and `prev` chained per writer; each part's ciphertext has the committed hash; at the
size of every signed checkpoint, stored or held by the auditor, the root is the signed one. Then what is not in the
tree: leaves not yet numbered, chains, tiles, the stored head, closing records, and the officers' index: a request that
is hidden from who searches is as good as one that is not there. Last, the policies that the leaves name by digest.

A leaf that was changed together with its stored hash shows later, in a root or in the next leaf of its writer.
`_blame` then finds which leaf of those not yet proved by a signature it was.

Memory is constant in the number of leaves: rows are streamed, per writer one hash is kept. All statements see one
state of the database. Knows no private key and opens no content.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, Row, Select, and_, func, literal, select

from audit.activation import wrong_policy
from audit.canonical import LeafError, leaf_hash
from audit.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from audit.content import ContentError, check_ciphertext
from audit.index import closing_values, opening_row
from audit.leaf import FIRST_PREV, Leaf
from audit.merkle import HASH_BYTES, Frontier, MerkleError, root_of
from audit.note import NoteError
from audit.records import CLOSING, RecordType
from audit.story import OPENING
from audit.tables import chain, checkpoint, content, head, leaf, leaf_number, request_index, tile
from audit.trust import Trust

LEAVES_AT_ONCE = 64  # whose content is looked up by one statement
TILE_WIDTH = 256  # hashes in a full tile
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Wrong:
    """The first thing wrong with a log."""

    log: str
    index: int | None  # leaf index, where it is a numbered leaf's fault
    reason: str

    def __str__(self) -> str:
        return f"{self.log}: " + ("" if self.index is None else f"leaf {self.index}: ") + self.reason


@dataclass(frozen=True, slots=True)
class LogReport:
    log: str
    leaves: int = 0  # numbered, found right
    unnumbered: int = 0  # written and chained, but not in the tree yet
    parts: int = 0  # of content
    writers: int = 0
    checkpoints: int = 0  # stored or held, signature checked
    signed_size: int = 0  # leaves the newest of them covers
    open_requests: int = 0  # received, not closed yet
    wrong: Wrong | None = None


@dataclass(frozen=True, slots=True)
class Report:
    logs: tuple[LogReport, ...]

    @property
    def first_wrong(self) -> Wrong | None:
        return next((report.wrong for report in self.logs if report.wrong is not None), None)


def verify(
    engine: Engine,
    trust: Trust,
    held: Sequence[str] = (),  # signed checkpoints the auditor kept: every log must extend them
    logs: Iterable[str] | None = None,  # None: all of the database, the trust file and `held`
) -> Report:
    """Recompute logs. A log is judged on its own: one that is wrong does not hide another.

    Raises:
        SQLAlchemyError: the database does not answer or has not these tables.
        NoteError, CheckpointError: a checkpoint of `held` is not one.
    """
    kept = _held(held, trust)
    with snapshot(engine) as connection:
        names = sorted(set(_logs(connection)) | trust.logs.keys() | kept.keys() if logs is None else set(logs))
        return Report(tuple(LogVerifier(connection, name, trust, kept.get(name, {})).run() for name in names))


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """Yield a connection on which all statements see one state of the database."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            yield connection
        return
    with engine.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        driver.text_factory = partial(str, encoding="utf-8", errors="replace")  # a row must not stop the verifier
        try:
            if not driver.in_transaction:
                connection.exec_driver_sql("BEGIN")  # the driver begins by itself only before a write
            yield connection
        finally:
            connection.rollback()
            driver.text_factory = str


class _Found(Exception):
    """Ends the work on a log: something is wrong."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        self.reason = reason
        self.index = index


@dataclass(slots=True)
class _Tail:
    """The last leaf of a writer so far."""

    seq: int = -1
    hash: str = FIRST_PREV
    index: int = 0


@dataclass(slots=True)
class _Counts:
    leaves: int = 0
    unnumbered: int = 0
    parts: int = 0
    checkpoints: int = 0
    signed_size: int = 0
    open_requests: int = 0


@dataclass(slots=True)
class LogVerifier:
    """One log, once. `run` tells the story; each step raises `_Found` at the first thing wrong."""

    connection: Connection
    log: str
    trust: Trust
    held: dict[int, bytes]  # size → root, of checkpoints the auditor kept
    tails: dict[str, _Tail] = field(default_factory=dict)
    frontier: Frontier = field(default_factory=Frontier)
    tile_hashes: list[bytes] = field(default_factory=list)  # of the tile that is filling up
    numbered: dict[str, int] = field(default_factory=dict)  # writer → its leaves in the tree
    counts: _Counts = field(default_factory=_Counts)

    def run(self) -> LogReport:
        wrong = None
        try:
            self._numbered_leaves()
            self.numbered = {writer: tail.seq + 1 for writer, tail in self.tails.items()}
            self._unnumbered_leaves()
            self._chains()
            self._upper_tiles()
            self._head()
            self._content_without_leaf()
            self._requests()
            self._index()
            self._policies()
        except _Found as found:
            wrong = Wrong(self.log, found.index, found.reason)
        except (TypeError, ValueError, OverflowError, MemoryError):
            # SQLite keeps any type in any column; what no writer of ours stores is somebody else's work.
            wrong = Wrong(self.log, None, f"a row near leaf {self.frontier.size} holds a value of another type")
        counts = self.counts
        return LogReport(
            self.log, counts.leaves, counts.unnumbered, counts.parts, len(self.tails),
            counts.checkpoints, counts.signed_size, counts.open_requests, wrong,
        )  # fmt: skip

    # --- the tree ---

    def _numbered_leaves(self) -> None:
        points = self._checkpoints()
        point = next(points, None)
        if point is not None and point.size == 0:
            point = next(points, None)
        for rows in _partitions(self.connection, self._numbered()):
            committed: dict[tuple[str, str], tuple[int, str]] = {}
            try:
                for row in rows:
                    committed |= self._numbered_leaf(row)
                    while point is not None and point.size == self.frontier.size:
                        self._root(point)
                        point = next(points, None)
            except _Found as found:
                self._content(committed, before=found.index)
                raise
            self._content(committed)
        if point is not None:
            size = self.frontier.size
            raise _Found(f"the log has {size} leaves, but {point.size} were signed: its tail is missing", size)
        if self.frontier.size and not self.counts.signed_size:
            raise _Found("no signed checkpoint covers any leaf: nothing can be proved")

    def _numbered(self) -> Select[Any]:
        return (
            select(
                leaf_number.c.leaf_index, leaf_number.c.writer.label("by"), leaf_number.c.writer_seq.label("seq"), leaf
            )
            .outerjoin(leaf, _same_leaf())
            .where(leaf_number.c.log == self.log)
            .order_by(leaf_number.c.leaf_index)
        )

    def _numbered_leaf(self, row: Row[Any]) -> dict[tuple[str, str], tuple[int, str]]:
        index = self.frontier.size
        if row.leaf_index != index:
            raise _Found("the leaf index is missing", index)
        if row.bytes is None:
            raise _Found(f"the row of this leaf, {row.seq} of writer `{row.by}`, is missing", index)
        parsed, hashed = self._leaf(row, index)
        self._chained(parsed, hashed, index)
        self.frontier.push(hashed)
        self._tile(hashed)
        self.counts.leaves += 1
        return {(parsed.record, part.name): (index, part.ct) for part in parsed.parts}

    def _leaf(self, row: Row[Any], index: int | None) -> tuple[Leaf, bytes]:
        """Check a row against itself; hash first, parse second."""
        stored = bytes(row.bytes)
        hashed = leaf_hash(stored)
        if hashed != bytes(row.leaf_hash):
            raise _Found("the bytes do not have the stored hash", index)
        try:
            parsed = Leaf.parse(stored)
        except LeafError as error:
            raise _Found(str(error), index) from error
        said = (parsed.log, parsed.writer, parsed.writer_seq, parsed.record, parsed.request, parsed.type.value)
        columns = (row.log, row.writer, row.writer_seq, row.record_id, row.request_id, row.type)
        if said != columns or _microseconds(parsed.time) != row.time:
            raise _Found("a column of the row says something else than the leaf", index)
        return parsed, hashed

    def _chained(self, parsed: Leaf, hashed: bytes, index: int | None) -> None:
        tail = self.tails.setdefault(parsed.writer, _Tail())
        if parsed.writer_seq != tail.seq + 1:
            raise _Found(
                f"before leaf {parsed.writer_seq} of writer `{parsed.writer}`, its {tail.seq + 1} is missing", index
            )
        if parsed.prev != tail.hash:
            # The leaf it should follow is beyond doubt only where a signature already covers it.
            if tail.seq >= 0 and tail.index >= self.counts.signed_size:
                self._blame(self.frontier.size)
            raise _Found(
                f"`prev` of leaf {parsed.writer_seq} of writer `{parsed.writer}` is not its previous leaf", index
            )
        tail.seq, tail.hash, tail.index = parsed.writer_seq, hashed.hex(), self.frontier.size

    def _tile(self, hashed: bytes) -> None:
        self.tile_hashes.append(hashed)
        if len(self.tile_hashes) == TILE_WIDTH:
            self._stored_tile(0, self.frontier.size // TILE_WIDTH - 1, self.tile_hashes)
            self.tile_hashes = []

    def _stored_tile(self, level: int, index: int, expected: Sequence[bytes]) -> None:
        stored = self._tile_row(level, index)
        first = index * TILE_WIDTH
        if stored is None:
            raise _Found(f"tile {index} of level {level} is missing", first if level == 0 else None)
        if stored == b"".join(expected):
            return
        different = (at for at, hashed in enumerate(expected) if stored[at * HASH_BYTES :][:HASH_BYTES] != hashed)
        at = next(different, 0)
        raise _Found(
            f"tile {index} of level {level} holds another hash than was computed", first + at if level == 0 else None
        )

    def _tile_row(self, level: int, index: int) -> bytes | None:
        where = and_(tile.c.log == self.log, tile.c.level == level, tile.c.tile_index == index)
        stored = self.connection.execute(select(tile.c.hashes).where(where)).scalar_one_or_none()
        return None if stored is None else bytes(stored)

    def _upper_tiles(self) -> None:
        """Check tiles above the leaves against those below, which are checked; and that there are no more."""
        level, full = 0, self.frontier.size // TILE_WIDTH
        while full:
            self._no_tile_beyond(level, full)
            level, full = level + 1, full // TILE_WIDTH
            for index in range(full):
                self._stored_tile(level, index, self._tile_roots(level - 1, index * TILE_WIDTH))
        self._no_tile_beyond(level, 0)

    def _tile_roots(self, level: int, first: int) -> list[bytes]:
        rows = (self._tile_row(level, index) or b"" for index in range(first, first + TILE_WIDTH))
        return [root_of([row[at : at + HASH_BYTES] for at in range(0, len(row), HASH_BYTES)]) for row in rows]

    def _no_tile_beyond(self, level: int, full: int) -> None:
        beyond = tile.c.tile_index >= full if full else tile.c.level >= level
        where = and_(tile.c.log == self.log, tile.c.level == level if full else literal(True), beyond)
        if self.connection.execute(select(tile.c.level).where(where).limit(1)).first() is not None:
            raise _Found(f"there are more tiles of level {level} than the log fills")

    # --- signatures ---

    def _checkpoints(self) -> Iterator[Checkpoint]:
        """Yield the stored checkpoints, checked, and those held, by size."""
        kept = [Checkpoint(self.log, size, root) for size, root in sorted(self.held.items())]
        at = 0
        for stored in self._stored_checkpoints():
            while at < len(kept) and kept[at].size <= stored.size:
                yield kept[at]
                at += 1
            yield stored
        yield from kept[at:]

    def _stored_checkpoints(self) -> Iterator[Checkpoint]:
        query = select(checkpoint).where(checkpoint.c.log == self.log).order_by(checkpoint.c.tree_size)
        verifiers = self.trust.logs.get(self.log, ())
        if not verifiers:
            raise _Found("the trust file has no key for this log: its signatures cannot be checked")
        for row in _stream(self.connection, query):
            try:
                signed = open_checkpoint(row.note, self.log, verifiers)
            except (NoteError, CheckpointError) as error:
                raise _Found(f"the checkpoint of size {row.tree_size}: {error}") from error
            if (signed.size, signed.root) != (row.tree_size, bytes(row.root)):
                raise _Found(f"the checkpoint of size {row.tree_size} is stored with another size or root than signed")
            yield signed

    def _root(self, point: Checkpoint) -> None:
        if self.frontier.root() != point.root:
            self._blame(point.size)
            raise _Found(
                f"the root at {point.size} leaves is not the signed one: this leaf or one after it, up to "
                f"{point.size - 1}, was changed, and what follows was made to fit",
                self.counts.signed_size,
            )
        self.counts.checkpoints += 1
        self.counts.signed_size = point.size

    def _blame(self, end: int) -> None:
        """Find which leaf, from the last signed size up to `end`, is not the one others still speak of."""
        begin = self.counts.signed_size
        rows = _stream(self.connection, self._successors(begin, end))
        for row in rows:
            hashed, index = leaf_hash(bytes(row.bytes)), row.leaf_index
            stored = self._tile_row(0, index // TILE_WIDTH)
            at = index % TILE_WIDTH * HASH_BYTES
            if stored is not None and stored[at : at + HASH_BYTES] != hashed:
                raise _Found("it is not the leaf whose hash the tile holds", index)
            if row.successor is not None and _prev(bytes(row.successor)) != hashed.hex():
                raise _Found("it is not the leaf that the next one of its writer follows", index)
        if end - begin == 1:
            raise _Found("it is not the leaf that was signed", begin)

    def _successors(self, begin: int, end: int) -> Select[Any]:
        after = leaf.alias("after")
        follows = and_(
            after.c.log == leaf.c.log, after.c.writer == leaf.c.writer, after.c.writer_seq == leaf.c.writer_seq + 1
        )
        return (
            select(leaf_number.c.leaf_index, leaf.c.bytes, after.c.bytes.label("successor"))
            .join(leaf, _same_leaf())
            .outerjoin(after, follows)
            .where(leaf_number.c.log == self.log, leaf_number.c.leaf_index.between(begin, end - 1))
            .order_by(leaf_number.c.leaf_index)
        )

    # --- beside the tree ---

    def _content(self, committed: dict[tuple[str, str], tuple[int, str]], before: int | None = None) -> None:
        """Check the ciphertexts of some leaves; `committed` is (record, part) → (leaf index, ct).

        With `before`, something is wrong with that leaf already, and only an earlier one is of interest.
        """
        records = {record for record, _ in committed}
        wrong: list[tuple[int, str]] = []
        for row in _stream(self.connection, select(content).where(content.c.record_id.in_(records))) if records else ():
            index, ct = committed.pop((row.record_id, row.part), (0, None))
            reason = None if ct is None else self._part(row, ct)
            if reason is not None:
                wrong.append((index, reason))
        wrong += [(index, f"the content of part `{part}` is missing") for (_, part), (index, _) in committed.items()]
        index, reason = min(wrong, default=(0, None))
        if reason is not None and (before is None or index < before):
            raise _Found(reason, index)

    def _part(self, row: Row[Any], ct: str) -> str | None:
        self.counts.parts += 1
        if row.log != self.log:
            return f"the content of part `{row.part}` is stored under another log"
        try:
            check_ciphertext(bytes.fromhex(ct), bytes(row.nonce), bytes(row.ciphertext))
        except ContentError as error:
            return f"part `{row.part}`: {error}"
        return None

    def _content_without_leaf(self) -> None:
        stored = select(func.count()).select_from(content).where(content.c.log == self.log)
        if self.connection.execute(stored).scalar_one() != self.counts.parts:
            raise _Found("there is content that no leaf commits to")

    def _unnumbered_leaves(self) -> None:
        query = (
            select(leaf)
            .outerjoin(leaf_number, _same_leaf())
            .where(leaf.c.log == self.log, leaf_number.c.leaf_index.is_(None))
            .order_by(leaf.c.writer, leaf.c.writer_seq)
        )
        for row in _stream(self.connection, query):
            try:
                parsed, hashed = self._leaf(row, None)
                self._content({(parsed.record, part.name): (0, part.ct) for part in parsed.parts})
            except _Found as found:
                where = f"leaf {row.writer_seq} of writer `{row.writer}`, not numbered yet: "
                raise _Found(where + found.reason) from found
            self._chained(parsed, hashed, None)
            self.counts.unnumbered += 1

    def _chains(self) -> None:
        """Compare with how far each writer says it came: the last leaves of a chain have no successor to miss them."""
        columns = (chain.c.writer, chain.c.appended, chain.c.numbered)
        unsaid = set(self.tails)
        for writer, appended, numbered in self.connection.execute(select(*columns).where(chain.c.log == self.log)):
            unsaid.discard(writer)
            found = self.tails[writer].seq + 1 if writer in self.tails else 0
            if found != appended:
                raise _Found(f"writer `{writer}` appended {appended} leaves, and {found} are there")
            if self.numbered.get(writer, 0) != numbered:
                raise _Found(f"of writer `{writer}`, {numbered} leaves are said to be numbered, and others are")
        if unsaid:
            raise _Found(f"of writer `{min(unsaid)}`, nothing says how many leaves it appended")

    def _head(self) -> None:
        stored = self.connection.execute(select(head).where(head.c.log == self.log)).one_or_none()
        if stored is None:
            raise _Found("the log is not in this database")
        try:
            same = Frontier.from_bytes(bytes(stored.frontier)) == self.frontier and stored.size == self.frontier.size
        except MerkleError:
            same = False
        if not same or stored.tenant != self._tenant:
            raise _Found("the stored head is not that of the leaves; rebuild it from them")

    def _requests(self) -> None:
        """Check that what was received is closed at most once, and nothing is closed that was not received."""
        kinds = {"received": (RecordType.REQUEST_RECEIVED,), "closed": CLOSING, "denied": (RecordType.REQUEST_DENIED,)}
        sums = [
            func.count().filter(leaf.c.type.in_([kind.value for kind in types])).label(name)
            for name, types in kinds.items()
        ]
        query = (
            select(leaf.c.request_id, *sums)
            .where(leaf.c.log == self.log, leaf.c.request_id.is_not(None))
            .group_by(leaf.c.request_id)
        )
        for row in _stream(self.connection, query):
            if row.received > 1 or row.denied > 1 or row.closed > row.received or (row.denied and row.received):
                reason = "is received, denied or closed more than once, or closed without being received"
                raise _Found(f"request `{row.request_id}` {reason}", self._last_index(row.request_id))
            self.counts.open_requests += row.received - row.closed

    # --- the officers' index ---

    @property
    def _tenant(self) -> str:
        """Whose log it is: its name ends in it, and no tenant's name holds a slash."""
        return self.log.rpartition("/")[2]

    def _index(self) -> None:
        """Check that every request has its row, that there are no others, and that each says what the leaves say."""
        stored = select(request_index).where(request_index.c.log == self.log).order_by(request_index.c.request_id)
        for rows in _partitions(self.connection, stored):
            leaves = self._leaves_of([row.request_id for row in rows])
            keys = self._keys_of(leaf.record for found in leaves.values() for leaf in found)
            for row in rows:
                self._index_row(row, leaves.get(row.request_id, ()), keys)
        opened = (
            select(leaf.c.request_id)
            .outerjoin(request_index, request_index.c.request_id == leaf.c.request_id)
            .where(leaf.c.log == self.log, leaf.c.type.in_([kind.value for kind in OPENING]))
            .where(request_index.c.request_id.is_(None))
        )
        hidden = self.connection.execute(opened.limit(1)).scalar_one_or_none()
        if hidden is not None:
            raise _Found(f"request `{hidden}` is missing in the officers' index", self._last_index(hidden))

    def _leaves_of(self, request_ids: Sequence[str]) -> dict[str, list[Leaf]]:
        """Return the first and the closing leaf of each request, in that order."""
        kinds = [kind.value for kind in OPENING | CLOSING]
        query = select(leaf.c.request_id, leaf.c.bytes).where(leaf.c.log == self.log, leaf.c.type.in_(kinds))
        found: dict[str, list[Leaf]] = {}
        for row in self.connection.execute(query.where(leaf.c.request_id.in_(request_ids))):
            found.setdefault(row.request_id, []).append(Leaf.parse(bytes(row.bytes)))
        return {request: sorted(leaves, key=lambda one: one.type in CLOSING) for request, leaves in found.items()}

    def _keys_of(self, records: Iterable[str]) -> dict[str, set[str]]:
        """Return the ids of the keys that each record's content is stored with."""
        query = select(content.c.record_id, content.c.key_id).where(content.c.record_id.in_(list(records))).distinct()
        found: dict[str, set[str]] = {}
        for record, key in self.connection.execute(query):
            found.setdefault(record, set()).add(key)
        return found

    def _index_row(self, row: Row[Any], leaves: Sequence[Leaf], keys: dict[str, set[str]]) -> None:
        if not leaves:
            raise _Found(f"the officers' index has a request `{row.request_id}` that the log has not")
        # Of the key nothing stands in a leaf; all content of a request has the same.
        other_key = any(keys.get(leaf.record, {row.key_id}) != {row.key_id} for leaf in leaves)
        wrong = "key_id" if other_key else self._says_otherwise(row, leaves)
        if wrong is not None:
            reason = f"the officers' index has another `{wrong}` of request `{row.request_id}` than its leaves"
            raise _Found(reason, self._last_index(row.request_id))

    def _says_otherwise(self, row: Row[Any], leaves: Sequence[Leaf]) -> str | None:
        """Return the first column that the leaves contradict."""
        opening, *closing = leaves
        try:
            expected = opening_row(opening, self._tenant, row.key_id, _microseconds(opening.time) or 0)
            for last in closing:
                values = closing_values(last, _microseconds(last.time) or 0)
                expected["guardrails"] += values["more_guardrails"]
                expected |= {name: values[name] for name in ("status", "code", "completed_at", "completion_tokens")}
        except (KeyError, AttributeError, TypeError) as error:
            raise _Found(f"a leaf of request `{row.request_id}` is not of its type's form") from error
        return next((name for name, value in expected.items() if getattr(row, name) != value), None)

    def _policies(self) -> None:
        """What decides is what was put on record as deciding; a policy's text and its digest could be edited alike."""
        wrong = wrong_policy(self.connection, self.log)
        if wrong is not None:
            raise _Found(*wrong)

    def _last_index(self, request_id: str) -> int | None:
        kinds = [kind.value for kind in (*CLOSING, RecordType.REQUEST_RECEIVED, RecordType.REQUEST_DENIED)]
        query = (
            select(func.max(leaf_number.c.leaf_index))
            .join(leaf, _same_leaf())
            .where(leaf.c.log == self.log, leaf.c.request_id == request_id, leaf.c.type.in_(kinds))
        )
        index: int | None = self.connection.execute(query).scalar_one()
        return index


def _held(notes: Sequence[str], trust: Trust) -> dict[str, dict[int, bytes]]:
    """Open the auditor's own checkpoints: origin → size → root."""
    kept: dict[str, dict[int, bytes]] = {}
    for note in notes:
        origin = Checkpoint.parse(note.partition("\n\n")[0] + "\n").origin
        point = open_checkpoint(note, origin, trust.logs.get(origin, ()))
        sizes = kept.setdefault(origin, {})
        if sizes.setdefault(point.size, point.root) != point.root:
            raise CheckpointError(f"two checkpoints of `{origin}` with {point.size} leaves have different roots")
    return kept


def _logs(connection: Connection) -> Iterator[str]:
    tables = (leaf, leaf_number, tile, checkpoint, content, head, chain, request_index)
    return itertools.chain.from_iterable(connection.execute(select(t.c.log).distinct()).scalars() for t in tables)


def _same_leaf() -> Any:
    return and_(
        leaf.c.log == leaf_number.c.log,
        leaf.c.writer == leaf_number.c.writer,
        leaf.c.writer_seq == leaf_number.c.writer_seq,
    )


def _stream(connection: Connection, query: Select[Any]) -> Iterator[Row[Any]]:
    for rows in _partitions(connection, query):
        yield from rows


def _partitions(connection: Connection, query: Select[Any]) -> Iterator[Sequence[Row[Any]]]:
    """Yield the rows by 64. The cursor is closed whether they are read to the end or not: PostgreSQL keeps it open."""
    options = {"stream_results": True, "yield_per": LEAVES_AT_ONCE}
    with closing(connection.execute(query, execution_options=options)) as result:
        yield from result.partitions(LEAVES_AT_ONCE)


def _microseconds(time: str) -> int | None:
    try:
        return (datetime.fromisoformat(time) - EPOCH) // timedelta(microseconds=1)
    except ValueError:
        return None


def _prev(stored: bytes) -> str | None:
    try:
        return Leaf.parse(stored).prev
    except LeafError:
        return None
