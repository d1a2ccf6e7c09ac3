"""The log's database: opened so that what it confirms is durable, refused where it would not be.

SQLite: WAL, synchronous=FULL, recursive triggers (else REPLACE deletes unseen), an authorizer on every connection (no
trigger can stop DROP TABLE), and a lock file, because one process owns an embedded log. PostgreSQL: fsync,
full_page_writes, synchronous_commit. Each setting is read back. Readers are read-only.

Knows connections and settings, not what is stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

from audit.tables import EVIDENCE, metadata

# DatabaseRefused            catch this: the database cannot keep the promise; nothing was written
# ├── DatabaseUnsafe         a setting that would lose what was confirmed
# ├── DatabaseUnprotected    a defence (trigger) is missing
# ├── DatabaseOutdated       the tables are not there, or of another version
# └── DatabaseInUse          another process owns the embedded log


class DatabaseRefused(Exception):
    """The database cannot keep the log's promises."""


class DatabaseUnsafe(DatabaseRefused):
    """A setting would lose what was confirmed."""


class DatabaseUnprotected(DatabaseRefused):
    """An append-only trigger is missing."""


class DatabaseOutdated(DatabaseRefused):
    """The tables are missing."""


class DatabaseInUse(DatabaseRefused):
    """Another process has the embedded log open."""


READERS = 4  # connections that readers share
CONNECT_TIMEOUT_S = 5

# A server whose machine is gone says nothing at all: a connection to it must end, to be made anew.
_NO_HANGING = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "tcp_user_timeout": CONNECT_TIMEOUT_S * 1000,
    "keepalives_idle": CONNECT_TIMEOUT_S,
    "keepalives_interval": 1,
    "keepalives_count": 3,
}

_SQLITE = {"journal_mode": {"wal"}, "synchronous": {"2", "3"}, "recursive_triggers": {"1"}, "foreign_keys": {"1"}}
_POSTGRESQL = {
    "fsync": {"on"},
    "full_page_writes": {"on"},
    "synchronous_commit": {"on", "remote_write", "remote_apply"},
}
_WRITE_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "recursive_triggers=ON", "foreign_keys=ON",
                  "busy_timeout=5000", "trusted_schema=OFF")  # fmt: skip

# SHA-256 of the triggers as the migrations make them, and of the functions that they call.
TRIGGERS = {
    "sqlite": "057c995780bb4f0026442d8ab45e09ff228acb02c5c572f2737bdace18aaa92a",
    "postgresql": "0cf7e7694bae2fd2a8b0fb6246ca0179438783afd1f81bdae1ee636caf663894",
}
_SQLITE_BODIES = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
_POSTGRESQL_BODIES = """
    SELECT tgname, tgname || ' ' || tgtype || ' ' || proname
           || replace(prosrc, quote_ident(current_schema()) || '.', '') || coalesce(pg_get_expr(tgqual, tgrelid), '')
    FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid JOIN pg_class ON pg_class.oid = tgrelid
    WHERE relnamespace = current_schema()::regnamespace
    UNION ALL
    SELECT evtname, evtname || ' ' || evtevent || ' ' || array_to_string(evttags, ',') || ' ' || proname || prosrc
    FROM pg_event_trigger JOIN pg_proc ON pg_proc.oid = evtfoid
"""

# What no connection of ours may do to SQLite, whatever text reaches it. Migrations bring no authorizer.
_FORBIDDEN = frozenset(
    {
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_DROP_INDEX,
        sqlite3.SQLITE_DROP_TRIGGER,
        sqlite3.SQLITE_DROP_VIEW,
        sqlite3.SQLITE_ALTER_TABLE,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_CREATE_VTABLE,
        sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
        sqlite3.SQLITE_DROP_VTABLE,
        sqlite3.SQLITE_ATTACH,
        sqlite3.SQLITE_DETACH,
    }
)
_CHANGES = frozenset({sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
_EVIDENCE = frozenset(table.name for table in EVIDENCE)
# Pragmas that may be given a value. Any other would weaken what was set and read back (`synchronous=OFF`).
_PRAGMAS = frozenset(
    {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list",
     "max_page_count"}
)  # fmt: skip


class Database:
    """Where the log lies. `writer` is the writer thread's one connection; readers share a pool of read-only ones.

    `watcher` reads too, on connections of its own: for what every answer waits for, and no officer may hold up.
    """

    def __init__(self, url: str, writer: Engine, reader: Engine, watcher: Engine, lock: int | None) -> None:
        self.url = url
        self.writer = writer
        self.reader = reader
        self.watcher = watcher
        self._lock = lock

    @property
    def embedded(self) -> bool:
        return self.writer.dialect.name == "sqlite"

    @classmethod
    def open(cls, url: str) -> Database:
        """Connect and check.

        Raises: DatabaseRefused and its kinds, each saying what to do.
        """
        dialect = make_url(url).get_backend_name()
        if dialect not in ("sqlite", "postgresql"):
            raise DatabaseUnsafe(f"`{dialect}` is not supported; use sqlite:/// or postgresql+psycopg://")
        lock = _lock(url) if dialect == "sqlite" else None
        database = cls(url, _writer(url, dialect), reader_engine(url), reader_engine(url), lock)
        try:
            database._check()
        except SQLAlchemyError as error:
            database.close()
            raise DatabaseRefused("the database does not answer; check `database.url` and that it runs") from error
        except DatabaseRefused:
            database.close()
            raise
        return database

    def close(self) -> None:
        self.reader.dispose()
        self.watcher.dispose()
        self.writer.dispose()  # last: it may write the write-ahead log back, and then the file alone is the log
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def disk_free(self) -> int | None:
        """Return the free bytes where an embedded log lies; None for a server, whose disk is not ours to see."""
        if not self.embedded:
            return None
        status = os.statvfs(_path(self.url).parent)
        return status.f_bavail * status.f_frsize

    def _check(self) -> None:
        with self.writer.connect() as connection:
            check_settings(connection)
            check_tables(connection)
            check_defences(connection)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a read-only connection on which all statements see one state."""
    with engine.connect() as connection, connection.begin():
        yield connection


def reader_engine(url: str) -> Engine:
    """Return an engine whose connections cannot write."""
    if make_url(url).get_backend_name() == "sqlite":
        path = _path(url)
        engine = create_engine(
            f"sqlite:///file:{quote(str(path))}?mode=ro&uri=true",
            poolclass=QueuePool,
            pool_size=READERS,
            hide_parameters=True,
            connect_args={"check_same_thread": False},
        )
        event.listen(engine, "connect", _prepare_sqlite_reader)
        return engine
    return create_engine(
        url, pool_size=READERS, pool_pre_ping=True, hide_parameters=True,
        connect_args={"options": "-c default_transaction_read_only=on", **_NO_HANGING},
    )  # fmt: skip


def check_settings(connection: Connection) -> None:
    """Read the settings back that durability rests on. Raises DatabaseUnsafe."""
    embedded = connection.dialect.name == "sqlite"
    verb, wanted = ("PRAGMA", _SQLITE) if embedded else ("SHOW", _POSTGRESQL)
    for setting, allowed in wanted.items():
        value = str(connection.execute(text(f"{verb} {setting}")).scalar_one())
        if value not in allowed:
            raise DatabaseUnsafe(f"`{setting}` of the database is `{value}`; it must be `{min(allowed)}`")


def check_tables(connection: Connection) -> None:
    """Raises DatabaseOutdated unless every table of the log is there."""
    missing = sorted(metadata.tables.keys() - set(inspect(connection).get_table_names()))
    if missing:
        raise DatabaseOutdated(f"the table `{missing[0]}` is missing; run `probity db upgrade`")


def check_defences(connection: Connection) -> None:
    """Raises DatabaseUnprotected unless every append-only trigger is there and enabled."""
    present = _sqlite_triggers(connection) if connection.dialect.name == "sqlite" else _pg_triggers(connection)
    missing = sorted(expected_triggers(connection.dialect.name) - present)
    if missing:
        raise DatabaseUnprotected(
            f"the trigger `{missing[0]}` is missing or disabled; run `probity db upgrade`, then verify the log"
        )
    if _trigger_digest(connection) != TRIGGERS[connection.dialect.name]:
        raise DatabaseUnprotected(
            "a trigger of the log was replaced by another of its name; verify the log, restore it"
        )


def expected_triggers(dialect: str) -> frozenset[str]:
    """Return `table.trigger` of each, and the event trigger's name."""
    kinds = ("no_update", "no_delete", "no_replace") if dialect == "sqlite" else ("append_only", "no_truncate")
    names = {f"{table.name}.{table.name}_{kind}" for table in EVIDENCE for kind in kinds}
    others = {"leaf_number.leaf_number_is_dense", "leaf.leaf_writer_seq_is_dense"}
    return frozenset(names | others | (set() if dialect == "sqlite" else {"probity_no_ddl"}))


def _sqlite_triggers(connection: Connection) -> set[str]:
    rows = connection.execute(text("SELECT tbl_name || '.' || name FROM sqlite_master WHERE type = 'trigger'"))
    return set(rows.scalars())


def _trigger_digest(connection: Connection) -> str:
    """Return what tells the triggers from others of the same names, which may do nothing."""
    dialect = connection.dialect.name
    own = {name.rpartition(".")[2] for name in expected_triggers(dialect)}
    rows = connection.execute(text(_SQLITE_BODIES if dialect == "sqlite" else _POSTGRESQL_BODIES)).all()
    joined = "\n".join(sorted(body for name, body in rows if name in own))
    return hashlib.sha256(joined.encode()).hexdigest()


def _pg_triggers(connection: Connection) -> set[str]:
    # 'A' is ALWAYS: it fires for replication roles too. `regclass` is the table that our statements find.
    on_tables = (
        f"SELECT '{table.name}.' || tgname FROM pg_trigger WHERE tgrelid = '{table.name}'::regclass AND tgenabled = 'A'"  # noqa: S608
        for table in EVIDENCE
    )
    on_events = "SELECT evtname FROM pg_event_trigger WHERE evtenabled = 'A'"
    return set(connection.execute(text(" UNION ALL ".join((*on_tables, on_events)))).scalars())


def _writer(url: str, dialect: str) -> Engine:
    if dialect == "sqlite":
        engine = create_engine(url, poolclass=QueuePool, pool_size=1, max_overflow=1, hide_parameters=True,
                               connect_args={"check_same_thread": False})  # fmt: skip
        event.listen(engine, "connect", _prepare_sqlite_writer)
        return engine
    return create_engine(
        url, pool_size=3, max_overflow=0, hide_parameters=True, connect_args={"connect_timeout": CONNECT_TIMEOUT_S}
    )


def _prepare_sqlite_writer(connection: Any, _record: object) -> None:
    for pragma in _WRITE_PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    connection.set_authorizer(_authorize)


def _prepare_sqlite_reader(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA query_only=ON")
    connection.execute("PRAGMA busy_timeout=5000")
    connection.set_authorizer(_authorize)  # ATTACH would open the same file again, to write


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    forbidden = (
        action in _FORBIDDEN
        or (action in _CHANGES and (first in _EVIDENCE or first == "sqlite_master"))
        or (action == sqlite3.SQLITE_PRAGMA and second is not None and (first or "").lower() not in _PRAGMAS)
    )
    return sqlite3.SQLITE_DENY if forbidden else sqlite3.SQLITE_OK


def _lock(url: str) -> int:
    path = _path(url).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise DatabaseInUse(f"another process has the log open: `{path.name}` is locked; stop it first") from error
    return descriptor


def _path(url: str) -> Path:
    database = make_url(url).database
    if not database or database == ":memory:":
        raise DatabaseUnsafe("an in-memory database keeps nothing; give `database.url` a file")
    return Path(database)
