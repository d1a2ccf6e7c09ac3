"""Filling the tables by the driver alone: any number of rows, and the same errors as through SQLAlchemy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from audit.index import close_rows
from audit.journal import clear_journal
from audit.tables import ROWS_A_STATEMENT, execute, insert_rows, journal, metadata

CANARY = "a canary in the row"


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    metadata.create_all(engine)
    with engine.connect() as connection, connection.begin():
        yield connection
    engine.dispose()


def segment(number: int) -> dict[str, object]:
    return {"request_id": f"r-{number}", "sequence": number, "choice": 0, "sealed": b"\0" * number}


@pytest.mark.parametrize("count", [0, 1, 2, ROWS_A_STATEMENT - 1, ROWS_A_STATEMENT, ROWS_A_STATEMENT + 1, 512])
def test_every_row_goes_in_whole_and_in_order(connection: Connection, count: int) -> None:
    rows = [segment(number) for number in range(count)]
    insert_rows(connection, journal, rows)
    stored = connection.execute(text("SELECT request_id, sequence, choice, sealed FROM journal ORDER BY rowid")).all()
    assert [tuple(row) for row in stored] == [tuple(row.values()) for row in rows]
    clear_journal(connection, [f"r-{number}" for number in range(0, count, 2)])
    left = connection.execute(text("SELECT sequence FROM journal ORDER BY sequence")).scalars().all()
    assert left == list(range(1, count, 2))


@pytest.mark.parametrize("count", [1, ROWS_A_STATEMENT + 1])
def test_each_row_is_closed_with_its_own_values(connection: Connection, count: int) -> None:
    columns = "request_id, log, tenant, writer, key_id, action, effect, policy, status, guardrails, received_at"
    for number in range(count + 1):
        connection.execute(
            text(f"INSERT INTO request_index ({columns}) VALUES "
                 f"('r-{number}', 'l', 't', 'w', 'k', 'a', 'allow', 'p', 'received', '|in|', 1)")
        )  # fmt: skip
    closings = [
        {
            "at_request": f"r-{number}",
            "status": "completed" if number % 2 else "failed",
            "code": None if number % 2 else f"code-{number}",
            "completed_at": 100 + number,
            "completion_tokens": number if number % 2 else None,
            "more_guardrails": "out|" if number % 3 else "",
        }
        for number in range(count)
    ]
    close_rows(connection, closings)
    query = (
        "SELECT request_id, status, code, completed_at, completion_tokens, guardrails FROM request_index ORDER BY rowid"
    )
    stored = [tuple(row) for row in connection.execute(text(query))]
    for row, closing in zip(stored, closings, strict=False):
        assert row == (*list(closing.values())[:-1], "|in|" + str(closing["more_guardrails"]))
    assert stored[count] == (f"r-{count}", "received", None, None, None, "|in|")


def test_a_refused_row_is_an_error_of_its_kind_that_shows_no_value(connection: Connection) -> None:
    row = {"request_id": CANARY, "sequence": 1, "choice": 0, "sealed": b"x"}
    with pytest.raises(IntegrityError) as caught:
        insert_rows(connection, journal, [row, row])
    assert not caught.value.connection_invalidated
    assert CANARY not in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)
    with pytest.raises(OperationalError, match="no such table"):
        execute(connection, "INSERT INTO nowhere VALUES (?)", (CANARY,))


def test_a_connection_that_broke_is_named_so_and_not_used_again() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        raw = connection.connection.dbapi_connection
        assert raw is not None
        raw.close()
        with pytest.raises(DBAPIError) as caught:
            execute(connection, "SELECT ?", (CANARY,))
        assert caught.value.connection_invalidated
        assert connection.invalidated
        assert CANARY not in str(caught.value)
    engine.dispose()
