"""Every attack on the log's rows is refused by the database, or caught by `verify` where nothing can refuse it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from audit.database import Database, DatabaseInUse, DatabaseOutdated, DatabaseUnprotected, DatabaseUnsafe
from audit.log import AuditLog
from audit.ratchet import RatchetAhead
from tests.support.audit_log import LogPlace, completed, embedded_place, received, request_id, server_place
from tests.support.postgres import PostgresDatabase, PostgresServer

EVIDENCE = ("leaf", "leaf_number", "tile", "checkpoint", "content")
LOG = "probity.local/acme-bank"


def fill(place: LogPlace, count: int = 300) -> None:
    """Two leaves a request: enough for full tiles."""
    log = place.open()
    asyncio.run(_append_all(log, count // 2))
    log.close()
    assert place.verify().first_wrong is None


async def _append_all(log: AuditLog, requests: int) -> None:
    await asyncio.gather(*(log.append(received(request_id(number))) for number in range(requests)))
    await asyncio.gather(*(log.append(completed(request_id(number))) for number in range(requests)))


@pytest.fixture(scope="module")
def filled_file(tmp_path_factory: pytest.TempPathFactory) -> LogPlace:
    place = embedded_place(tmp_path_factory.mktemp("attacked"))
    fill(place)
    return place


@pytest.fixture
def file(filled_file: LogPlace) -> Iterator[sqlite3.Connection]:
    """A connection as any tool would make one: no authorizer, SQLite's own defaults."""
    connection = sqlite3.connect(filled_file.admin_url.removeprefix("sqlite:///"), isolation_level=None)
    yield connection
    connection.close()
    assert filled_file.verify().first_wrong is None


@pytest.fixture(scope="module")
def filled_server(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LogPlace, PostgresDatabase]:
    database = postgres.database()
    place = server_place(tmp_path_factory.mktemp("attacked"), database)
    fill(place)
    return place, database


@pytest.fixture(params=["gateway", "postgres"])
def server(
    request: pytest.FixtureRequest, filled_server: tuple[LogPlace, PostgresDatabase]
) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """As the gateway's role, and as a superuser, whom no right stops."""
    place, database = filled_server
    with psycopg.connect(
        host=str(database.socket_directory), user=request.param, dbname=database.name, autocommit=True
    ) as connection:
        yield connection
    assert place.verify().first_wrong is None


# --- SQLite, a connection of any tool ---


@pytest.mark.parametrize("table", EVIDENCE)
@pytest.mark.parametrize("attack", ["UPDATE {0} SET log = log", "DELETE FROM {0}"])
def test_sqlite_refuses_to_change_or_delete_evidence(file: sqlite3.Connection, table: str, attack: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        file.execute(attack.format(table))


@pytest.mark.parametrize("table", EVIDENCE)
@pytest.mark.parametrize("verb", ["INSERT OR REPLACE", "REPLACE", "INSERT"])
def test_sqlite_refuses_to_replace_evidence(file: sqlite3.Connection, table: str, verb: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match=r"append-only|dense"):
        file.execute(f"{verb} INTO {table} SELECT * FROM {table} LIMIT 1")


@pytest.mark.parametrize("table", EVIDENCE)
def test_sqlite_refuses_to_replace_a_row_by_its_rowid(file: sqlite3.Connection, table: str) -> None:
    columns = [row[1] for row in file.execute(f"PRAGMA table_info({table})")]
    values = ", ".join("'elsewhere'" if name in ("log", "record_id") else name for name in columns)
    insert = f"REPLACE INTO {table} (rowid, {', '.join(columns)}) SELECT rowid, {values} FROM {table} WHERE rowid = 1"
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        file.execute(insert)


@pytest.mark.parametrize("kept", ["record_id", "request_id"])
def test_sqlite_refuses_to_replace_a_leaf_by_a_second_key(file: sqlite3.Connection, kept: str) -> None:
    record = "record_id" if kept == "record_id" else "'another'"
    insert = (
        "REPLACE INTO leaf (log, writer, writer_seq, leaf_hash, bytes, record_id, request_id, type, time) "
        f"SELECT 'elsewhere', 'me', 0, leaf_hash, x'00', {record}, request_id, type, time FROM leaf "
        "WHERE type = 'request.completed' LIMIT 1"
    )
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        file.execute(insert)


def test_sqlite_refuses_to_replace_a_number_by_its_leaf(file: sqlite3.Connection) -> None:
    insert = (
        "REPLACE INTO leaf_number SELECT log, (SELECT MAX(leaf_index) + 1 FROM leaf_number WHERE log = number.log), "
        "writer, writer_seq FROM leaf_number AS number LIMIT 1"
    )
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        file.execute(insert)


def test_sqlite_refuses_an_upsert(file: sqlite3.Connection) -> None:
    insert = (
        "INSERT INTO checkpoint SELECT * FROM checkpoint WHERE true LIMIT 1 "
        "ON CONFLICT (log, tree_size) DO UPDATE SET note = 'forged'"
    )
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        file.execute(insert)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_sqlite_refuses_a_gap_in_the_leaf_indexes(file: sqlite3.Connection, index: int) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="dense"):
        file.execute("INSERT INTO leaf_number VALUES (?, ?, 'me', 0)", (LOG, index))


@pytest.mark.parametrize("seq", [1, 10**6])
def test_sqlite_refuses_a_gap_in_a_writers_leaves(file: sqlite3.Connection, seq: int) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="dense"):
        file.execute(
            "INSERT INTO leaf VALUES (?, 'me', ?, zeroblob(32), x'', 'new', NULL, 'audit.read', 0)", (LOG, seq)
        )


# --- SQLite, our own connections ---


@pytest.mark.parametrize(
    "attack",
    [
        "DROP TABLE leaf",
        "DROP TRIGGER leaf_no_update",
        "DROP INDEX leaf_record",
        "ALTER TABLE leaf RENAME TO feuille",
        "CREATE TRIGGER mine AFTER INSERT ON leaf BEGIN SELECT 1; END",
        "CREATE TEMP TRIGGER mine BEFORE INSERT ON leaf BEGIN SELECT RAISE(IGNORE); END",
        "CREATE TABLE mine (a)",
        "ATTACH 'other.db' AS other",
        "PRAGMA synchronous=OFF",
        "PRAGMA journal_mode=OFF",
        "PRAGMA recursive_triggers=OFF",
        "PRAGMA writable_schema=ON",
        "PRAGMA query_only=OFF",
        "DELETE FROM sqlite_master",
        "UPDATE leaf SET bytes = x''",
        "DELETE FROM leaf",
        "INSERT INTO tile SELECT * FROM tile WHERE true ON CONFLICT DO UPDATE SET hashes = x''",
    ],
)
@pytest.mark.parametrize("side", ["writer", "reader"])
def test_our_own_connections_cannot_disarm_the_log(filled_file: LogPlace, side: str, attack: str) -> None:
    database = Database.open(filled_file.settings.database_url)
    try:
        with getattr(database, side).connect() as connection, pytest.raises(DBAPIError):
            connection.execute(text(attack))
    finally:
        database.close()


def test_a_reader_writes_nothing(filled_file: LogPlace) -> None:
    database = Database.open(filled_file.settings.database_url)
    try:
        with database.reader.connect() as connection, pytest.raises(DBAPIError, match="readonly"):
            connection.execute(text("UPDATE head SET size = 0"))
    finally:
        database.close()


def test_two_processes_cannot_open_one_embedded_log(filled_file: LogPlace) -> None:
    database = Database.open(filled_file.settings.database_url)
    try:
        with pytest.raises(DatabaseInUse, match=r"audit\.lock"):
            Database.open(filled_file.settings.database_url)
    finally:
        database.close()


# --- PostgreSQL ---


@pytest.mark.parametrize("table", EVIDENCE)
@pytest.mark.parametrize(
    "attack", ["UPDATE {0} SET log = log", "DELETE FROM {0}", "TRUNCATE {0}", "TRUNCATE {0} CASCADE"]
)
def test_postgresql_refuses_to_change_or_delete_evidence(
    server: psycopg.Connection[tuple[object, ...]], table: str, attack: str
) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"append-only|permission denied"):
        server.execute(attack.format(table).encode())


def test_postgresql_refuses_an_upsert(server: psycopg.Connection[tuple[object, ...]]) -> None:
    insert = (
        b"INSERT INTO checkpoint SELECT * FROM checkpoint LIMIT 1 "
        b"ON CONFLICT (log, tree_size) DO UPDATE SET note = 'forged'"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"append-only|permission denied"):
        server.execute(insert)


def test_postgresql_refuses_to_merge_into_evidence(server: psycopg.Connection[tuple[object, ...]]) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"append-only|permission denied"):
        server.execute(b"MERGE INTO leaf USING head ON leaf.log = head.log WHEN MATCHED THEN DELETE")


@pytest.mark.parametrize("setting", ["session_replication_role = replica", "row_security = off"])
def test_postgresql_triggers_fire_in_every_session(
    filled_server: tuple[LogPlace, PostgresDatabase], setting: str
) -> None:
    with filled_server[1].admin() as connection:
        connection.execute(f"SET {setting}".encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            connection.execute("DELETE FROM leaf")


@pytest.mark.parametrize(
    ("insert", "refused"),
    [
        ("INSERT INTO leaf_number VALUES (%(log)s, 1000000, 'me', 0)", "dense"),
        ("INSERT INTO leaf_number VALUES (%(log)s, -1, 'me', 0)", "dense"),
        ("INSERT INTO leaf VALUES (%(log)s, 'me', 1, sha256(%(leaf)s), 'x', 'r', NULL, 'audit.read', 0)", "dense"),
        (
            "INSERT INTO leaf VALUES (%(log)s, 'me', 0, sha256('y'), 'x', 'r', NULL, 'audit.read', 0)",
            "hash_is_of_bytes",
        ),
    ],
)
def test_postgresql_refuses_gaps_and_false_hashes(
    server: psycopg.Connection[tuple[object, ...]], insert: str, refused: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match=refused):
        server.execute(insert.encode(), {"log": LOG, "leaf": b"\0x"})


def test_a_temporary_table_does_not_hide_the_real_one_from_the_triggers(
    server: psycopg.Connection[tuple[object, ...]],
) -> None:
    server.execute("CREATE TEMP TABLE leaf_number (log text, leaf_index bigint)")
    server.execute("INSERT INTO leaf_number VALUES (%s, 999999)", (LOG,))
    with pytest.raises(psycopg.errors.CheckViolation, match="dense"):
        server.execute("INSERT INTO public.leaf_number VALUES (%s, 1000000, 'me', 0)", (LOG,))


@pytest.mark.parametrize(
    "attack",
    [
        "DROP TABLE leaf",
        "DROP TABLE leaf CASCADE",
        "DROP SCHEMA public CASCADE",
        "DROP TRIGGER leaf_append_only ON leaf",
        "DROP FUNCTION probity_append_only CASCADE",
        "DROP OWNED BY audit_owner CASCADE",
        "DROP INDEX leaf_closes_once",
        "ALTER TABLE leaf DISABLE TRIGGER ALL",
        "ALTER TABLE leaf DROP CONSTRAINT leaf_hash_is_of_bytes",
        "ALTER TABLE leaf RENAME TO feuille",
        "ALTER SCHEMA public RENAME TO private",
        "CREATE RULE mine AS ON INSERT TO leaf DO INSTEAD NOTHING",
        "CREATE TRIGGER mine BEFORE INSERT ON leaf FOR EACH ROW EXECUTE FUNCTION probity_append_only()",
        "CREATE OR REPLACE FUNCTION probity_append_only() RETURNS trigger LANGUAGE sql AS ''",
        "GRANT ALL ON leaf TO PUBLIC",
    ],
)
def test_postgresql_refuses_to_disarm_the_log(server: psycopg.Connection[tuple[object, ...]], attack: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        server.execute(attack.encode())


@pytest.mark.parametrize("attack", ["SET probity.migration = 'on'; DROP TABLE leaf", "SET ROLE audit_owner"])
def test_the_gateway_cannot_pass_for_a_migration(filled_server: tuple[LogPlace, PostgresDatabase], attack: str) -> None:
    database = filled_server[1]
    with (
        psycopg.connect(host=str(database.socket_directory), user="gateway", dbname=database.name) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(attack.encode())


@pytest.mark.parametrize("table", [*EVIDENCE, "journal", "writer", "chain", "head", "request_index"])
def test_the_officers_role_reads_and_writes_nothing(
    filled_server: tuple[LogPlace, PostgresDatabase], table: str
) -> None:
    database = filled_server[1]
    with psycopg.connect(
        host=str(database.socket_directory), user="officer", dbname=database.name, autocommit=True
    ) as connection:
        connection.execute(f"SELECT * FROM {table} LIMIT 1".encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(f"INSERT INTO {table} SELECT * FROM {table}".encode())


# --- what cannot be refused is caught ---


def disarmed(place: LogPlace, statements: list[str]) -> None:
    """Do what the owner of the file, or a superuser, can do."""
    if place.admin_url.startswith("sqlite"):
        connection = sqlite3.connect(place.admin_url.removeprefix("sqlite:///"), isolation_level=None)
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        connection.close()
        return
    with psycopg.connect(place.admin_url.replace("+psycopg", ""), autocommit=True) as server:
        server.execute("ALTER EVENT TRIGGER probity_no_ddl DISABLE")
        for table in EVIDENCE:
            server.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL".encode())
        server.execute("ALTER TABLE leaf DROP CONSTRAINT leaf_hash_is_of_bytes")
        for statement in statements:
            server.execute(statement.encode())


AT_5 = f"(SELECT writer FROM leaf_number WHERE log = '{LOG}' AND leaf_index = 5)"
SEQ_5 = f"(SELECT writer_seq FROM leaf_number WHERE log = '{LOG}' AND leaf_index = 5)"
LEAF_5 = f"log = '{LOG}' AND writer = {AT_5} AND writer_seq = {SEQ_5}"


@pytest.mark.parametrize(
    ("attack", "names"),
    [
        ([f"UPDATE leaf SET time = time + 1 WHERE {LEAF_5}"], "leaf 5"),
        ([f"UPDATE leaf SET bytes = leaf_hash WHERE {LEAF_5}"], "leaf 5"),
        ([f"DELETE FROM leaf WHERE {LEAF_5}"], "leaf 5"),
        (["UPDATE content SET ciphertext = nonce WHERE part = 'output'"], "output"),
        (["DELETE FROM content WHERE part = 'prompt'"], "prompt"),
        ([f"DELETE FROM leaf_number WHERE log = '{LOG}' AND leaf_index >= 5"], LOG),
        (["UPDATE tile SET tile_index = 7"], "tile"),
        (["UPDATE checkpoint SET tree_size = tree_size + 1000"], "checkpoint"),
        (
            [
                f"DELETE FROM leaf WHERE log = '{LOG}' AND writer_seq >= 100",
                f"DELETE FROM leaf_number WHERE log = '{LOG}' AND writer_seq >= 100",
                f"UPDATE chain SET appended = 100, numbered = 100 WHERE log = '{LOG}'",
                f"DELETE FROM checkpoint WHERE log = '{LOG}'",
            ],
            LOG,
        ),
    ],
)
def test_what_a_superuser_edits_is_named_by_verify(place: LogPlace, attack: list[str], names: str) -> None:
    fill(place)
    disarmed(place, attack)
    wrong = place.verify().first_wrong
    assert wrong is not None
    assert names in str(wrong)


def test_a_log_without_its_triggers_is_not_opened(place: LogPlace) -> None:
    fill(place, 2)
    disarmed(place, [])
    with pytest.raises(DatabaseUnprotected, match="missing or disabled"):
        place.open()


@pytest.mark.parametrize("trigger", ["leaf_no_update", "checkpoint_no_delete", "leaf_number_is_dense"])
def test_a_log_whose_trigger_was_replaced_by_one_that_does_nothing_is_not_opened(tmp_path: Path, trigger: str) -> None:
    place = embedded_place(tmp_path)
    fill(place, 2)
    with closing(sqlite3.connect(tmp_path / "audit.db", isolation_level=None)) as thief:
        (sql,) = thief.execute("SELECT sql FROM sqlite_master WHERE name = ?", (trigger,)).fetchone()
        thief.execute(f"DROP TRIGGER {trigger}")
        thief.execute(sql[: sql.index("BEGIN SELECT")] + "BEGIN SELECT 1; END")
    with pytest.raises(DatabaseUnprotected, match="replaced by another"):
        place.open()


@pytest.mark.parametrize(
    "attack",
    [
        "CREATE OR REPLACE FUNCTION probity_append_only() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN RETURN OLD; END $$",
        "CREATE OR REPLACE FUNCTION probity_no_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$",
        "CREATE OR REPLACE TRIGGER leaf_append_only BEFORE UPDATE OR DELETE ON leaf FOR EACH ROW WHEN (false) "
        "EXECUTE FUNCTION probity_append_only()",
    ],
    ids=["function", "event function", "trigger"],
)
def test_a_server_whose_trigger_was_made_to_do_nothing_is_not_opened(
    postgres: PostgresServer, tmp_path: Path, attack: str
) -> None:
    database = postgres.database()
    with database.admin() as superuser:
        superuser.execute("SET probity.migration = 'on'")
        superuser.execute(attack.encode())
        superuser.execute("ALTER TABLE leaf ENABLE ALWAYS TRIGGER leaf_append_only")
    with pytest.raises(DatabaseUnprotected, match="replaced by another"):
        server_place(tmp_path, database).open()


def test_a_log_without_its_tables_is_not_opened(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    disarmed(place, ["DROP TABLE tile"])
    with pytest.raises(DatabaseOutdated, match="`tile` is missing"):
        place.open()


def test_a_log_whose_tail_was_cut_off_is_not_opened(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    fill(place, 10)
    backup = Path(f"{tmp_path}/audit.db").read_bytes()
    log = place.open()
    log.append_blocking(received(request_id(77)))
    log.close()
    Path(f"{tmp_path}/audit.db").write_bytes(backup)
    with pytest.raises(RatchetAhead, match="behind the ratchet"):
        place.open()


def test_a_postgresql_that_would_lose_commits_is_not_opened(postgres: PostgresServer, tmp_path: Path) -> None:
    database = postgres.database()
    with database.admin() as connection:
        connection.execute(f"ALTER DATABASE {database.name} SET synchronous_commit = off".encode())
    with pytest.raises(DatabaseUnsafe, match="`synchronous_commit` of the database is `off`"):
        server_place(tmp_path, database).open()
