"""The tables: one alembic history for SQLite and PostgreSQL.

`upgrade(url)` is all that a user needs (`probity db upgrade`); there is no alembic.ini. On PostgreSQL a superuser runs
it: the log's database refuses DDL elsewhere by an event trigger, which `probity.migration` passes by, and later steps
grant the roles `audit_writer` and `audit_reader` what they need on tables they add. Alembic's batch mode recreates
SQLite tables and silently drops their triggers: it is never used here, and audit/database.py checks at every start
that the triggers stand.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine

HEAD = "head"


def upgrade(url: str, revision: str = HEAD) -> None:
    """Bring the database at `url` to `revision`. Raises what the database raises; a failed step leaves no half."""
    _run(command.upgrade, url, revision)


def downgrade(url: str, revision: str) -> None:
    """Take the database back. It destroys evidence, and is for tests: the gateway refuses what is not at the head."""
    _run(command.downgrade, url, revision)


def _run(action: object, url: str, revision: str) -> None:
    engine = create_engine(url, hide_parameters=True)
    try:
        with as_file(files(__package__)) as directory:
            _apply(action, engine, str(directory), revision)
    finally:
        engine.dispose()


def _apply(action: object, engine: Engine, directory: str, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", directory)
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        _begin(connection)
        config.attributes["connection"] = connection
        action(config, revision)  # type: ignore[operator]


def _begin(connection: Connection) -> None:
    """Make DDL part of the transaction on SQLite, where the driver would commit it at once, and allowed elsewhere."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql("SET LOCAL probity.migration = 'on'")
