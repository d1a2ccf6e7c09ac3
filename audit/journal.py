"""Recovery: requests that a writer received and did not live to close.

A segment is in the journal before it is sent. When a process dies, its open requests are closed by the next one, as
`request.interrupted`, with exactly the text that was durable: what a client saw is a part of it. A writer is fenced
before its orphans are closed, so that it cannot close them too.

Knows the journal's rows and the writers' leases; the closing records themselves go through the writer like any other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from audit.content import open_transient
from audit.records import Json, Record, RecordType
from audit.tables import ROWS_A_STATEMENT, execute, journal, placeholders, request_index, writer

TOKENS_BEHIND = b"\xff"  # between a segment's text and what goes along of its tokens, JSON


@dataclass(frozen=True, slots=True)
class Orphan:
    """A request without a closing record, whose writer has ended."""

    request_id: str
    tenant: str
    key_id: str


def part_name(sequence: int) -> str:
    """Return the name under which a segment is encrypted; it ties the row to its place."""
    return f"journal_{sequence}"


def fence(connection: Connection, own_id: str, now_us: int, *, sole_writer: bool) -> None:
    """End every other writer whose lease ran out; all others, where this process alone may write."""
    ended = update(writer).where(writer.c.ended.is_(None), writer.c.id != own_id)
    if not sole_writer:
        ended = ended.where(writer.c.lease_until < now_us)
    connection.execute(ended.values(ended=now_us))


def orphans(connection: Connection) -> list[Orphan]:
    """Return the open requests of ended writers, oldest first."""
    rows = connection.execute(
        select(request_index.c.request_id, request_index.c.tenant, request_index.c.key_id)
        .join(writer, writer.c.id == request_index.c.writer)
        .where(request_index.c.status == "received", writer.c.ended.is_not(None))
        .order_by(request_index.c.received_at, request_index.c.request_id)
    )
    return [Orphan(*row) for row in rows]


def clear_journal(connection: Connection, request_ids: Sequence[str]) -> None:
    """Forget the segments of requests whose closing record is in the same transaction."""
    for at in range(0, len(request_ids), ROWS_A_STATEMENT):
        some = request_ids[at : at + ROWS_A_STATEMENT]
        row = placeholders(1, len(some), connection.dialect)
        execute(connection, f"DELETE FROM journal WHERE request_id IN {row}", tuple(some))  # noqa: S608


@dataclass(frozen=True, slots=True)
class Durable:
    """What was journaled of an answer, by choice."""

    texts: list[str]
    logprobs: list[list[Any]]  # what went along of tokens; as many members as there are texts


def journaled(connection: Connection, orphan: Orphan, data_key: bytes) -> Durable:
    """Return what is durable of each choice, in the order it was journaled."""
    rows = connection.execute(
        select(journal.c.sequence, journal.c.choice, journal.c.sealed)
        .where(journal.c.request_id == orphan.request_id)
        .order_by(journal.c.sequence)
    )
    texts: defaultdict[int, bytes] = defaultdict(bytes)
    told: defaultdict[int, list[Any]] = defaultdict(list)
    for sequence, choice, sealed in rows:
        data = open_transient(data_key, orphan.tenant, orphan.request_id, part_name(sequence), bytes(sealed))
        text, _, tokens = data.partition(TOKENS_BEHIND)
        texts[choice] += text
        told[choice] += json.loads(tokens) if tokens else []
    choices = range(max(texts, default=-1) + 1)
    return Durable([texts[index].decode() for index in choices], [told[index] for index in choices])


def interrupted(orphan: Orphan, durable: Durable) -> Record:
    """Return the closing record of an orphan."""
    parts = {"output": _json(durable.texts)}
    if any(durable.logprobs):
        parts["logprobs"] = _json({"choices": durable.logprobs})
    body: dict[str, Json] = {"reason": "writer_ended", "choices": len(durable.texts)}
    return Record(RecordType.REQUEST_INTERRUPTED, orphan.tenant, body, orphan.request_id, parts)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
