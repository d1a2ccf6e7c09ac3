"""The store on both databases, on the tables that the migrations make."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, inspect

import migrations
from policies.document import read_document
from policies.store import PolicyStore, StaleGeneration, activate, insert_version
from policies.tables import metadata
from tests.support.policies import document_value
from tests.support.postgres import PostgresServer


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path}/audit.db"
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.empty_database().admin_url
    migrations.upgrade(url)
    made = create_engine(url)
    yield made
    made.dispose()


def test_the_tables_have_the_columns_the_code_declares(engine: Engine) -> None:
    seen = inspect(engine)
    for table in metadata.sorted_tables:
        columns = {column["name"]: column for column in seen.get_columns(table.name)}
        assert set(columns) == {column.name for column in table.columns}
        for column in table.columns:
            assert columns[column.name]["nullable"] == column.nullable, column
            assert str(columns[column.name]["type"]) == str(column.type.compile(engine.dialect)), column
        keys = seen.get_pk_constraint(table.name)["constrained_columns"]
        assert keys == [column.name for column in table.primary_key]


def test_a_stored_policy_reads_back_with_its_digest(engine: Engine) -> None:
    document = read_document(document_value())
    with engine.begin() as connection:
        number = insert_version(connection, document, "author", "first", 1, 0)
        activate(connection, "acme", number, 1)
    current = PolicyStore(engine).current("acme")
    assert current is not None
    assert current.document == document
    assert current.document.canonical() == document.canonical()


def test_of_two_changes_against_one_generation_one_holds(engine: Engine) -> None:
    with engine.begin() as connection:
        insert_version(connection, read_document(document_value()), "author", "first", 1, 0)

    def change(name: str) -> str:
        try:
            with engine.begin() as connection:
                document = read_document(document_value(name=name))
                return f"stored {insert_version(connection, document, name, 'race', 2, 1)}"
        except StaleGeneration:
            return "stale"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(change, ("ann", "ben"))) == ["stale", "stored 2"]
    store = PolicyStore(engine)
    assert [version.version for version in store.versions("acme")] == [1, 2]
    assert store.state("acme").generation == 2
