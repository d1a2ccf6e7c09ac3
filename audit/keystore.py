"""The store of wrapped data keys: a database of its own, with backups of its own.

Content becomes unreadable for ever when its data key is destroyed, so the keys must not lie in the backups of the
content. A data key is durable here before anything encrypted with it is written. One row:

    key_id "0193f0c2-…"   tenant "acme-bank"   wrapped 80 bytes (keys.py)

Destroying overwrites the row's bytes in the file and in the write-ahead log; a backup of this store holds the key until
it expires. Knows neither leaves nor plaintext keys.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    create_engine,
    delete,
    event,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from audit.durable import exposed
from audit.tables import insert_rows

# KeyStoreError            catch this
# ├── KeyStoreUnsafe       the database would acknowledge what a power cut can still lose: refuse to start
# ├── KeyStoreExposed      others than its owner may read or write its file: refuse to start
# ├── KeyStoreMissing      there is no key store where one must be: a new one would hold none of the keys
# ├── KeyStoreUnavailable  the database did not answer; nothing may be encrypted with the keys of this call
# ├── KeyConflict          another key is already stored under this id: the caller is wrong
# └── KeyNotHeld           there is no such key: it was destroyed, or this is not its store


class KeyStoreError(Exception):
    """The key store refuses."""


class KeyStoreUnsafe(KeyStoreError):
    """A setting of the database breaks the promise of durability."""


class KeyStoreExposed(KeyStoreError):
    """Others than its owner may read or write its file."""


class KeyStoreMissing(KeyStoreError):
    """There is no key store here."""


class KeyStoreUnavailable(KeyStoreError):
    """The database did not confirm."""


class KeyConflict(KeyStoreError):
    """Another key has this id."""


class KeyNotHeld(KeyStoreError):
    """The key was destroyed or never stored here."""


metadata = MetaData()
data_key = Table(
    "data_key",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
)
_MISSING = "the key store of this log is missing; restore it: without it no content can be read"
MAX_IDS_PER_STATEMENT = 500  # below SQLite's and PostgreSQL's limits on bound values


@dataclass(frozen=True, slots=True)
class WrappedKey:
    key_id: str  # at most 64 characters
    tenant: str
    wrapped: bytes = field(repr=False)


class KeyStore:
    """Safe to share between threads: every call takes a connection of its own."""

    def __init__(self, engine: Engine) -> None:
        """Use `engine`, made by `open`."""
        self._engine = engine

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> KeyStore:
        """Connect, create the table where it is missing, and read the settings back.

        Raises:
            KeyStoreMissing: it is not there, and is not to be created.
            KeyStoreUnsafe: a commit here would not be durable.
            KeyStoreExposed: its file gives anything to group or others.
            KeyStoreUnavailable: no connection.
        """
        embedded = make_url(url).get_backend_name() == "sqlite"  # a file needs no question whether it is still there
        if embedded and not create and not os.path.exists(make_url(url).database or ""):
            raise KeyStoreMissing(_MISSING)
        if embedded:
            _check_private(make_url(url).database)
        engine = create_engine(url, pool_pre_ping=not embedded, hide_parameters=True)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _set_pragmas)
            _create_private(engine.url.database)
        try:
            if create:
                metadata.create_all(engine)
            elif not inspect(engine).has_table(data_key.name):
                raise KeyStoreMissing(_MISSING)
            with engine.connect() as connection:
                _check_settings(connection)
        except SQLAlchemyError as error:
            engine.dispose()
            raise KeyStoreUnavailable(
                "the key store cannot be opened; check its database URL and its rights"
            ) from error
        except KeyStoreError:
            engine.dispose()
            raise
        return cls(engine)

    def close(self) -> None:
        self._engine.dispose()

    def put_many(self, keys: Sequence[WrappedKey]) -> None:
        """Store keys in one transaction; when this returns they survive a crash.

        Storing what is already stored is no error: after a lost answer the same call can be made again.

        Raises:
            KeyConflict: another key has one of the ids. Nothing is stored.
            KeyStoreUnavailable: not confirmed; the keys may or may not be stored.
        """
        if not keys:
            return
        try:
            try:
                self._insert(keys)
            except IntegrityError:
                self._insert(self._absent(keys))
        except SQLAlchemyError as error:
            raise KeyStoreUnavailable("the key store did not confirm") from error

    def get(self, key_id: str) -> WrappedKey:
        """Return a key.

        Raises:
            KeyNotHeld: destroyed, or never stored here.
            KeyStoreUnavailable: the database did not answer.
        """
        found = self.get_many([key_id])
        if key_id not in found:
            raise KeyNotHeld("the data key of this content was destroyed, or is not in this key store")
        return found[key_id]

    def get_many(self, key_ids: Iterable[str]) -> dict[str, WrappedKey]:
        """Return those of the keys that are held, by id."""
        ids = list(dict.fromkeys(key_ids))
        try:
            with self._engine.connect() as connection:
                rows = [row for some in _slices(ids) for row in connection.execute(_select(some))]
        except SQLAlchemyError as error:
            raise KeyStoreUnavailable("the key store did not answer") from error
        return {row.key_id: WrappedKey(row.key_id, row.tenant, bytes(row.wrapped)) for row in rows}

    def destroy(self, key_ids: Iterable[str]) -> int:
        """Destroy keys, durably, and return how many there were. What they encrypted is unreadable from now on.

        Raises:
            KeyStoreUnavailable: not confirmed; repeat the call.
        """
        ids = list(dict.fromkeys(key_ids))
        try:
            with self._engine.begin() as connection:
                count = sum(
                    connection.execute(delete(data_key).where(data_key.c.key_id.in_(some))).rowcount
                    for some in _slices(ids)
                )
            self._forget_log()
        except SQLAlchemyError as error:
            raise KeyStoreUnavailable("the key store did not confirm the destruction") from error
        return count

    def _insert(self, keys: Sequence[WrappedKey]) -> None:
        rows = [{"key_id": key.key_id, "tenant": key.tenant, "wrapped": key.wrapped} for key in keys]
        if rows:
            with self._engine.begin() as connection:
                insert_rows(connection, data_key, rows)

    def _absent(self, keys: Sequence[WrappedKey]) -> list[WrappedKey]:
        """Return those not stored yet; refuse an id that is taken by another key."""
        wanted = {key.key_id: key for key in keys}
        if any(wanted[key.key_id] != key for key in keys):
            raise KeyConflict("two different keys were given one id")
        held = self.get_many(wanted)
        if any(wanted[key_id] != key for key_id, key in held.items()):
            raise KeyConflict("another key is stored under this id; ids are never used twice")
        return [key for key_id, key in wanted.items() if key_id not in held]

    def _forget_log(self) -> None:
        """Move what was deleted out of SQLite's write-ahead log, which would keep the old bytes."""
        if self._engine.dialect.name == "sqlite":
            with self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def _select(ids: Sequence[str]) -> Select[Any]:
    return select(data_key).where(data_key.c.key_id.in_(ids))


def _slices(ids: list[str]) -> Iterable[list[str]]:
    return (ids[at : at + MAX_IDS_PER_STATEMENT] for at in range(0, len(ids), MAX_IDS_PER_STATEMENT))


def _create_private(path: str | None) -> None:
    """Make SQLite's file before SQLite does, mode 0600; its log files take the mode from it."""
    if path and path != ":memory:":
        with suppress(OSError):  # it exists, or cannot be made, which connecting will say
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _check_private(path: str | None) -> None:
    """Raise KeyStoreExposed unless the file and its write-ahead log, which holds keys too, are their owner's alone."""
    for name in (path, f"{path}-wal", f"{path}-shm") if path and path != ":memory:" else ():
        told = exposed(Path(name))
        if told is not None:
            raise KeyStoreExposed(f"the key store {told}")


def _set_pragmas(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


# What each database must answer. `synchronous_commit` may be stronger than `on`.
_SQLITE = {"journal_mode": {"wal"}, "synchronous": {"2", "3"}, "secure_delete": {"1"}}
_POSTGRESQL = {
    "fsync": {"on"},
    "synchronous_commit": {"on", "remote_write", "remote_apply"},
    "full_page_writes": {"on"},
}


def _check_settings(connection: Connection) -> None:
    dialect = connection.dialect.name
    if dialect not in ("sqlite", "postgresql"):
        raise KeyStoreUnsafe(f"`{dialect}` is not supported; use SQLite or PostgreSQL")
    verb, wanted = ("PRAGMA", _SQLITE) if dialect == "sqlite" else ("SHOW", _POSTGRESQL)
    for setting, allowed in wanted.items():
        value = str(connection.execute(text(f"{verb} {setting}")).scalar_one())
        if value not in allowed:
            raise KeyStoreUnsafe(f"`{setting}` of the key store is `{value}`; it must be `{min(allowed)}`")
