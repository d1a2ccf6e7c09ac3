"""Reading the log: requests by their metadata, one request's story, its content, and proofs.

Every call reads and none writes. Whoever calls puts `audit.read` (or `audit.revealed`, with a reason) on record before
it hands the answer on, in the log of each tenant whose records it holds: `RequestRow.tenant`, `RequestStory.tenant`,
`tenant_of`. Knows no permissions.

Leaves are checked against their hash as they are read, content against its commitments: what is returned is what was
recorded, or a named error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, and_, case, func, select

from audit.canonical import LeafError, leaf_hash
from audit.checkpoint import Checkpoint, read_checkpoint
from audit.content import ContentError, SealedPart, open_part
from audit.database import reading
from audit.keys import KeyRefused, Keyring
from audit.keystore import KeyNotHeld, KeyStore
from audit.leaf import Leaf
from audit.merkle import consistency_proof, inclusion_proof
from audit.query import RequestPage, RequestQuery, page, statement
from audit.records import CLOSING, Receipt
from audit.sequencer import node_reader
from audit.story import OPENING, RequestStory, StoredLeaf, tell
from audit.tables import checkpoint, content, head, leaf, leaf_number, request_index

# ReadError              catch this, and QueryRefused (query.py) for filters
# ├── NotFound           no such request, leaf or log
# ├── NotSignedYet       the leaf is on record; a checkpoint that covers it follows within a second: ask again
# ├── ContentErased      the data key was destroyed: the content is unreadable for ever, its proofs stay valid
# └── EvidenceDamaged    what is stored is not what was recorded: run verify


class ReadError(Exception):
    """The log cannot answer."""


class NotFound(ReadError):
    """There is no such request, leaf or log."""


class NotSignedYet(ReadError):
    """No checkpoint covers the leaf yet."""


class ContentErased(ReadError):
    """The content's key was destroyed."""


class EvidenceDamaged(ReadError):
    """A leaf or its content is not what was recorded."""


@dataclass(frozen=True, slots=True)
class RevealedContent:
    """What was said. `repr` shows none of it."""

    prompt: bytes | None = field(repr=False)  # the request body as sent
    prompt_to_model: bytes | None = field(repr=False)  # the rendered text after redaction; None if denied
    output: bytes | None = field(repr=False)  # JSON list, one text a choice; None while the request is open
    output_tokens: bytes | None = field(repr=False)  # JSON list of lists of token ids as generated
    identities: Mapping[str, str] = field(repr=False)  # e.g. subject, source
    logprobs: bytes | None = field(default=None, repr=False)  # JSON: what was told of tokens beside the text


@dataclass(frozen=True, slots=True)
class SignedCheckpoint:
    checkpoint: Checkpoint
    note: str  # the signed note


@dataclass(frozen=True, slots=True)
class InclusionProof:
    """Proof that a leaf stands in the tree of a signed checkpoint; see `merkle.check_inclusion`."""

    log: str
    leaf_index: int
    leaf_hash: bytes  # 32 bytes
    hashes: tuple[bytes, ...]
    signed: SignedCheckpoint


@dataclass(frozen=True, slots=True)
class ConsistencyProof:
    """Proof that the tree of `new` leaves extends that of `old`; see `merkle.check_consistency`."""

    log: str
    old: int
    new: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NumberedReceipt:
    """A receipt, and where its leaf has come to stand."""

    type: str
    receipt: Receipt
    leaf_index: int | None  # None while it is not numbered, ≤ 1 s


@dataclass(frozen=True, slots=True)
class TokenUse:
    """What one request used of its limits, as far as it is known: reserved while open, used once closed."""

    received_at: int  # microseconds since 1970 UTC
    tenant: str
    subject: str  # pseudonym
    tokens: int


class AuditReader:
    """Safe to share between threads: every call takes a read-only connection of its own."""

    def __init__(self, engine: Engine, keyring: Keyring, keystore: KeyStore) -> None:
        self._engine = engine
        self._keyring = keyring
        self._keystore = keystore

    # --- requests ---

    def requests(self, query: RequestQuery) -> RequestPage:
        """Return a slice of the requests that fit, newest first. Cost: an index range, never a count."""
        with reading(self._engine) as connection:
            known = tuple(connection.execute(select(head.c.tenant)).scalars())
            tenants = known if query.tenants is None else tuple(t for t in known if t in query.tenants)
            rows = connection.execute(statement(query, tenants, self._keyring.pseudonym)).all()
        return page(query, list(rows))

    def uses_since(self, moment_us: int) -> Iterator[TokenUse]:
        """Yield the use of every request received since, oldest first: what a limit ledger is rebuilt from."""
        use = case(
            (request_index.c.completion_tokens.is_not(None), _total_tokens),
            else_=func.coalesce(request_index.c.reserved_tokens, 0),
        )
        columns = (request_index.c.received_at, request_index.c.tenant, request_index.c.subject, use)
        query = (
            select(*columns)
            .where(request_index.c.received_at >= moment_us, request_index.c.status != "denied")
            .order_by(request_index.c.received_at, request_index.c.request_id)
        )
        with reading(self._engine) as connection:
            for moment, tenant, subject, tokens in connection.execute(query):
                yield TokenUse(moment, tenant, subject or "", tokens)

    def tenant_of(self, request_id: str) -> str:
        """Return whose request it is. Raises NotFound."""
        with reading(self._engine) as connection:
            return _tenant_of(connection, request_id)

    def story(self, request_id: str) -> RequestStory:
        """Return the whole story of a request, metadata only.

        Raises:
            NotFound: no such request.
            EvidenceDamaged: a leaf of it is not what was recorded.
        """
        with reading(self._engine) as connection:
            return tell(_tenant_of(connection, request_id), _leaves(connection, request_id))

    def leaves(self, request_id: str) -> list[StoredLeaf]:
        """Return the leaves of a request in the order they were written. Raises as `story` does."""
        with reading(self._engine) as connection:
            return _leaves(connection, request_id)

    def receipts(self, request_id: str) -> list[NumberedReceipt]:
        """Return the receipt of each record of a request. Raises as `story` does."""
        return [
            NumberedReceipt(
                stored.leaf.type.value,
                Receipt(stored.leaf.log, stored.leaf.writer, stored.leaf.writer_seq, stored.leaf_hash),
                stored.leaf_index,
            )
            for stored in self.leaves(request_id)
        ]

    def reveal(self, request_id: str) -> RevealedContent:
        """Return what was said, each part checked against the leaf's commitments.

        Raises:
            NotFound: no such request.
            ContentErased: its data key was destroyed.
            EvidenceDamaged: a leaf or ciphertext is not what was recorded, or a key is another tenant's.
        """
        with reading(self._engine) as connection:
            tenant = _tenant_of(connection, request_id)
            sealed = _sealed_parts(connection, _leaves(connection, request_id))
        keys: dict[str, bytes] = {}
        opened = {part.name: self._open(tenant, part, keys) for part in sealed}
        return RevealedContent(
            prompt=opened.get("prompt"),
            prompt_to_model=opened.get("prompt_to_model"),
            output=opened.get("output"),
            output_tokens=opened.get("output_tokens"),
            identities=json.loads(opened.get("identities", b"{}")),
            logprobs=opened.get("logprobs"),
        )

    def _open(self, tenant: str, part: _StoredPart, keys: dict[str, bytes]) -> bytes:
        try:
            if part.key_id not in keys:
                keys[part.key_id] = self._keyring.encryption.unwrap(tenant, self._keystore.get(part.key_id).wrapped)
            return open_part(keys[part.key_id], tenant, part.record, part.name, part.sealed).plaintext
        except KeyNotHeld as error:
            raise ContentErased(str(error)) from error
        except (ContentError, KeyRefused) as error:
            raise EvidenceDamaged(f"{error}; run verify") from error

    # --- proofs ---

    def checkpoint(self, tenant: str) -> SignedCheckpoint:
        """Return the newest signed checkpoint of a tenant's log.

        Raises:
            NotFound: the tenant has no log.
            NotSignedYet: its first checkpoint follows within a second.
        """
        with reading(self._engine) as connection:
            return _newest(connection, _log_of(connection, tenant))

    def inclusion(self, tenant: str, writer: str, writer_seq: int, size: int | None = None) -> InclusionProof:
        """Return the proof for the leaf a receipt names, under the newest checkpoint or the one of `size` leaves.

        Raises:
            NotFound: no such leaf, or no checkpoint of that size.
            NotSignedYet: not numbered, or the checkpoint does not cover it.
        """
        with reading(self._engine) as connection:
            log = _log_of(connection, tenant)
            index = _index_of(connection, log, writer, writer_seq)
            return _inclusion(connection, log, index, _signed(connection, log, size))

    def inclusion_at(self, tenant: str, index: int, size: int | None = None) -> InclusionProof:
        """Return the proof for leaf `index` of the log. Raises as `inclusion` does."""
        with reading(self._engine) as connection:
            log = _log_of(connection, tenant)
            return _inclusion(connection, log, index, _signed(connection, log, size))

    def consistency(self, tenant: str, old: int, new: int) -> ConsistencyProof:
        """Return the proof that the log of `new` leaves extends that of `old`.

        Raises:
            NotFound: the tenant has no log, or it has not so many leaves.
            OutOfRange: not 1 ≤ old ≤ new.
        """
        with reading(self._engine) as connection:
            log = _log_of(connection, tenant)
            if new > connection.execute(select(head.c.size).where(head.c.log == log)).scalar_one():
                raise NotFound(f"`{log}` has fewer than {new} leaves")
            return ConsistencyProof(log, old, new, tuple(consistency_proof(old, new, node_reader(connection, log))))


@dataclass(frozen=True, slots=True)
class _StoredPart:
    name: str
    record: str
    key_id: str
    sealed: SealedPart


_total_tokens = func.coalesce(request_index.c.prompt_tokens, 0) + request_index.c.completion_tokens


def _tenant_of(connection: Connection, request_id: str) -> str:
    query = select(request_index.c.tenant).where(request_index.c.request_id == request_id)
    tenant: str | None = connection.execute(query).scalar_one_or_none()
    if tenant is None:
        raise NotFound("there is no such request")
    return tenant


def _log_of(connection: Connection, tenant: str) -> str:
    log: str | None = connection.execute(select(head.c.log).where(head.c.tenant == tenant)).scalar_one_or_none()
    if log is None:
        raise NotFound("the tenant has no log")
    return log


def _leaves(connection: Connection, request_id: str) -> list[StoredLeaf]:
    query = (
        select(leaf.c.bytes, leaf.c.leaf_hash, leaf.c.request_id, leaf_number.c.leaf_index)
        .outerjoin(leaf_number, _SAME_LEAF)
        .where(leaf.c.request_id == request_id)
        .order_by(leaf.c.time, leaf.c.record_id)
    )
    leaves = [_stored_leaf(row) for row in connection.execute(query)]
    if not any(stored.leaf.type in OPENING for stored in leaves):
        raise NotFound("there is no such request")
    return leaves


def _stored_leaf(row: Any) -> StoredLeaf:
    stored = bytes(row.bytes)
    hashed = leaf_hash(stored)
    try:
        parsed = Leaf.parse(stored)
    except LeafError as error:
        raise EvidenceDamaged("a leaf of this request is damaged; run verify") from error
    if hashed != bytes(row.leaf_hash) or parsed.request != row.request_id:
        raise EvidenceDamaged("a leaf of this request is not what was recorded; run verify")
    return StoredLeaf(parsed, hashed.hex(), row.leaf_index)


def _sealed_parts(connection: Connection, leaves: list[StoredLeaf]) -> list[_StoredPart]:
    records = [stored.leaf.record for stored in leaves]
    rows = connection.execute(select(content).where(content.c.record_id.in_(records)))
    stored = {(row.record_id, row.part): row for row in rows}
    parts = []
    # Other records of a request, such as `audit.revealed`, are about it and no part of it.
    for at in leaves:
        for part in at.leaf.parts if at.leaf.type in OPENING | CLOSING else ():
            row = stored.get((at.leaf.record, part.name))
            if row is None:
                raise EvidenceDamaged(f"the content of part `{part.name}` is missing; run verify")
            sealed = SealedPart(
                bytes.fromhex(part.com), bytes.fromhex(part.ct), bytes(row.nonce), bytes(row.ciphertext)
            )
            parts.append(_StoredPart(part.name, at.leaf.record, row.key_id, sealed))
    return parts


def _index_of(connection: Connection, log: str, writer: str, writer_seq: int) -> int:
    where = and_(leaf.c.log == log, leaf.c.writer == writer, leaf.c.writer_seq == writer_seq)
    query = select(leaf_number.c.leaf_index).select_from(leaf).outerjoin(leaf_number, _SAME_LEAF).where(where)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound("there is no such leaf")
    if row.leaf_index is None:
        raise NotSignedYet("the leaf is on record but not in the tree yet; ask again in a second")
    index: int = row.leaf_index
    return index


def _newest(connection: Connection, log: str) -> SignedCheckpoint:
    query = select(checkpoint.c.note).where(checkpoint.c.log == log).order_by(checkpoint.c.tree_size.desc()).limit(1)
    note: str | None = connection.execute(query).scalar_one_or_none()
    if note is None:
        raise NotSignedYet("the log has no checkpoint yet; ask again in a second")
    return SignedCheckpoint(read_checkpoint(note), note)


def _signed(connection: Connection, log: str, size: int | None) -> SignedCheckpoint:
    if size is None:
        return _newest(connection, log)
    query = select(checkpoint.c.note).where(checkpoint.c.log == log, checkpoint.c.tree_size == size)
    note: str | None = connection.execute(query).scalar_one_or_none()
    if note is None:
        raise NotFound(f"`{log}` has no checkpoint of {size} leaves")
    return SignedCheckpoint(read_checkpoint(note), note)


def _inclusion(connection: Connection, log: str, index: int, signed: SignedCheckpoint) -> InclusionProof:
    size = signed.checkpoint.size
    read: Callable[[int, int], bytes] = node_reader(connection, log)
    if index < 0:
        raise NotFound("there is no such leaf")
    if index >= size:
        raise NotSignedYet("the checkpoint does not cover the leaf yet; ask again in a second")
    return InclusionProof(log, index, read(0, index), tuple(inclusion_proof(index, size, read)), signed)


_SAME_LEAF = and_(
    leaf_number.c.log == leaf.c.log,
    leaf_number.c.writer == leaf.c.writer,
    leaf_number.c.writer_seq == leaf.c.writer_seq,
)
