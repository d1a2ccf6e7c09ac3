"""The history runs up, down and up again on both databases, and leaves what the code declares."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

import migrations
from audit.database import check_defences, check_tables
from audit.tables import metadata
from tests.support.postgres import PostgresServer


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/audit.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.empty_database().admin_url


def test_the_history_goes_up_down_and_up(empty_url: str) -> None:
    migrations.upgrade(empty_url)
    migrations.downgrade(empty_url, "base")
    engine = create_engine(empty_url)
    try:
        assert inspect(engine).get_table_names() == ["alembic_version"]
        migrations.upgrade(empty_url)
        with engine.connect() as connection:
            check_tables(connection)
            check_defences(connection)
    finally:
        engine.dispose()


def test_the_tables_have_the_columns_and_indexes_the_code_declares(empty_url: str) -> None:
    migrations.upgrade(empty_url)
    engine = create_engine(empty_url)
    try:
        found = inspect(engine)
        for table in metadata.tables.values():
            columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
            assert columns == {column.name: column.nullable for column in table.columns}
            assert found.get_pk_constraint(table.name)["constrained_columns"] == list(table.primary_key.columns.keys())
            # PostgreSQL lists the index behind a unique constraint too.
            assert {index.name for index in table.indexes} <= {index["name"] for index in found.get_indexes(table.name)}
    finally:
        engine.dispose()


def test_a_step_that_fails_leaves_nothing(empty_url: str) -> None:
    engine = create_engine(empty_url)
    try:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE writer (id integer)"))  # in the way of the first step
        with pytest.raises(SQLAlchemyError):
            migrations.upgrade(empty_url)
        assert set(inspect(engine).get_table_names()) == {"writer"}
    finally:
        engine.dispose()


def test_the_gateways_role_may_ask_for_an_upgrade_that_is_already_there(postgres: PostgresServer) -> None:
    migrations.upgrade(postgres.database().url)


def test_the_gateways_role_keeps_policies_and_cannot_change_a_stored_version(postgres: PostgresServer) -> None:
    engine = create_engine(postgres.database().url)
    try:
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO policy_version VALUES ('acme-bank', 1, '', '', 'mia', '', 0)"))
            connection.execute(text("INSERT INTO tenant_state VALUES ('acme-bank', NULL, false, 0)"))
            connection.execute(text("UPDATE tenant_state SET active_version = 1"))
        with pytest.raises(SQLAlchemyError, match="permission denied"), engine.begin() as connection:
            connection.execute(text("UPDATE policy_version SET document = 'another'"))
    finally:
        engine.dispose()
