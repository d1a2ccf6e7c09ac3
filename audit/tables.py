"""The tables of the log. Created by migrations/versions/0001_audit.py, which also sets their defences.

    evidence  (append-only)   leaf · leaf_number · tile · checkpoint · content
    in flight (transient)     journal
    mutable   (rebuildable)   writer · chain · head · request_index

Times are integers, microseconds since 1970 UTC. Content is ciphertext; its keys lie in a store of their own
(keystore.py). Knows columns and how to fill them, no rules: what may be written when is in writer.py and sequencer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    UniqueConstraint,
    UpdateBase,
    text,
)
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

# Which leaves say what policy holds; written out, so that both databases find them by their index.
IN_FORCE = "type IN ('policy.activated', 'policy.rolled_back')"

metadata = MetaData()

_LOG = String(255)  # an origin, e.g. `probity.local/acme-bank`
_ID = String(36)  # a UUID

# One row a leaf, as its writer chained it. `bytes` are verbatim what `leaf_hash` is the hash of.
leaf = Table(
    "leaf",
    metadata,
    Column("log", _LOG, primary_key=True),
    Column("writer", String(32), primary_key=True),
    Column("writer_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("leaf_hash", LargeBinary, nullable=False),
    Column("bytes", LargeBinary, nullable=False),
    Column("record_id", _ID, nullable=False),
    Column("request_id", _ID),
    Column("type", String(40), nullable=False),
    Column("time", BigInteger, nullable=False),
    CheckConstraint("writer_seq >= 0", name="leaf_writer_seq_is_a_count"),
    CheckConstraint("length(leaf_hash) = 32", name="leaf_hash_has_32_bytes"),
    Index("leaf_request", "request_id"),
    Index("leaf_record", "record_id", unique=True),
    Index("leaf_in_force", "log", "time", sqlite_where=text(IN_FORCE), postgresql_where=text(IN_FORCE)),
    # Exactly one closing record a request, whoever writes it.
    Index(
        "leaf_closes_once",
        "request_id",
        unique=True,
        sqlite_where=text("type IN ('request.completed', 'request.failed', 'request.interrupted')"),
        postgresql_where=text("type IN ('request.completed', 'request.failed', 'request.interrupted')"),
    ),
)

# The log's own order: which leaf is leaf `leaf_index`. Dense from 0.
leaf_number = Table(
    "leaf_number",
    metadata,
    Column("log", _LOG, primary_key=True),
    Column("leaf_index", BigInteger, primary_key=True, autoincrement=False),
    Column("writer", String(32), nullable=False),
    Column("writer_seq", BigInteger, nullable=False),
    UniqueConstraint("log", "writer", "writer_seq", name="leaf_is_numbered_once"),
)

# Full tiles of 256 hashes (C2SP tlog-tiles): level 0 holds leaf hashes, level n the roots of 256 tiles of level n − 1.
tile = Table(
    "tile",
    metadata,
    Column("log", _LOG, primary_key=True),
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("tile_index", BigInteger, primary_key=True, autoincrement=False),
    Column("hashes", LargeBinary, nullable=False),  # 8,192 bytes
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("log", _LOG, primary_key=True),
    Column("tree_size", BigInteger, primary_key=True, autoincrement=False),
    Column("root", LargeBinary, nullable=False),
    Column("note", String, nullable=False),  # the signed note
    Column("time", BigInteger, nullable=False),
)

content = Table(
    "content",
    metadata,
    Column("record_id", _ID, primary_key=True),
    Column("part", String(64), primary_key=True),
    Column("log", _LOG, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("nonce", LargeBinary, nullable=False),
    Column("ciphertext", LargeBinary, nullable=False),
)

# Segments of answers that are still being generated; gone when the request's closing record is durable.
journal = Table(
    "journal",
    metadata,
    Column("request_id", _ID, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("choice", Integer, nullable=False),
    Column("sealed", LargeBinary, nullable=False),  # nonce ‖ ciphertext
)

# Who writes. A writer whose lease ran out may be fenced, and is never heard again.
writer = Table(
    "writer",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("started", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
    Column("ended", BigInteger),  # stopped in order, or fenced
)

# How far each writer's chain in each log has come, and how far it is numbered. Counts of leaves.
chain = Table(
    "chain",
    metadata,
    Column("log", _LOG, primary_key=True),
    Column("writer", String(32), primary_key=True),
    Column("appended", BigInteger, nullable=False),
    Column("numbered", BigInteger, nullable=False),
)

# The right edge of each log's tree.
head = Table(
    "head",
    metadata,
    Column("log", _LOG, primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("frontier", LargeBinary, nullable=False),
)

# The officers' view: one row a request, built from its leaves and rebuildable from them.
request_index = Table(
    "request_index",
    metadata,
    Column("request_id", _ID, primary_key=True),
    Column("log", _LOG, nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("writer", String(32), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("subject", String(64)),  # pseudonym
    Column("client", String(256)),
    Column("purpose", String(128)),
    Column("action", String(40), nullable=False),
    Column("model_alias", String(128)),
    Column("model_version", String(80)),
    Column("effect", String(8), nullable=False),  # allow | deny
    Column("policy", String(80), nullable=False),
    Column("status", String(16), nullable=False),  # received | completed | denied | failed | interrupted | cancelled
    Column("code", String(64)),  # of a denial or a failure
    Column("guardrails", String, nullable=False),  # ids that found something: `|pii-in|pii-out|`, or empty
    Column("received_at", BigInteger, nullable=False),
    Column("completed_at", BigInteger),
    Column("prompt_tokens", BigInteger),
    Column("completion_tokens", BigInteger),
    Column("reserved_tokens", BigInteger),
    Index("request_index_by_tenant", "tenant", "received_at", "request_id"),
    Index("request_index_by_time", "received_at", "request_id"),
    Index(
        "request_index_open",
        "writer",
        sqlite_where=text("status = 'received'"),
        postgresql_where=text("status = 'received'"),
    ),
)

EVIDENCE = (leaf, leaf_number, tile, checkpoint, content)  # append-only, by the database's own hand


# The writer shares the interpreter with everything else. Every call into a database driver lets go of it, and under
# load waits milliseconds to have it back: so rows go in by the statement, not one by one.
ROWS_A_STATEMENT = 64  # below what SQLite and PostgreSQL bind at once, for the widest table


def insert_rows(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows, each with every column of the table."""
    if not rows:
        return
    names = _names(table)
    for some in batched(rows):
        values = tuple(row[name] for row in some for name in names)
        execute(connection, _insert_into(table, len(some), connection.dialect), values)


def batched(rows: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    """Yield the rows by the statement."""
    for at in range(0, len(rows), ROWS_A_STATEMENT):
        yield rows[at : at + ROWS_A_STATEMENT]


def placeholders(rows: int, columns: int, dialect: Dialect) -> str:
    """Return the text of values to bind: `(?, ?), (?, ?)`."""
    sign = "?" if dialect.name == "sqlite" else "%s"
    return ", ".join([f"({', '.join([sign] * columns)})"] * rows)


def run(connection: Connection, statement: UpdateBase | Select[Any], row: dict[str, Any]) -> DBAPICursor:
    """Execute a statement built once; `row` has the bound values by name."""
    compiled, positions = _compiled(statement, connection.dialect)
    return execute(connection, compiled, row if positions is None else tuple(row[name] for name in positions))


def execute(connection: Connection, statement: str, values: Sequence[Any] | Mapping[str, Any]) -> DBAPICursor:
    """Execute in the connection's transaction, by the driver alone: what SQLAlchemy does around it costs more than most
    of these statements do.

    Raises: SQLAlchemy's DBAPIError and its kinds, as SQLAlchemy would, but for the values, which are content.
    """
    dialect = connection.dialect
    assert dialect.loaded_dbapi is not None
    driver = connection.connection
    try:
        cursor = driver.cursor()
        cursor.execute(statement, values)
    except dialect.loaded_dbapi.Error as error:
        broken = dialect.is_disconnect(error, driver, None)
        if broken:
            connection.invalidate(error)
        raise DBAPIError.instance(
            statement, None, error, dialect.loaded_dbapi.Error, connection_invalidated=broken, dialect=dialect
        ) from error
    return cursor


@lru_cache(maxsize=64)
def _names(table: Table) -> tuple[str, ...]:
    return tuple(table.columns.keys())


@lru_cache(maxsize=1024)
def _insert_into(table: Table, rows: int, dialect: Dialect) -> str:
    names = _names(table)
    columns, values = ", ".join(names), placeholders(rows, len(names), dialect)
    return f"INSERT INTO {table.name} ({columns}) VALUES {values}"  # noqa: S608 - names are ours, values are bound


@lru_cache(maxsize=64)
def _compiled(statement: UpdateBase | Select[Any], dialect: Dialect) -> tuple[str, list[str] | None]:
    """Return the text, and the order of its values for a driver that takes them by position."""
    compiled = statement.compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    return compiled.string, compiled.positiontup
