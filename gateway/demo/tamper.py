"""The cheat of the demo: somebody with the database file and no scruples turns a denial into something else.

On a copy, never on the log itself. The cheat is a good one: the triggers are dropped, the leaf stays canonical, and
its stored hash is computed anew, so that the row by itself looks right.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from audit.canonical import leaf_hash

_WAS, _BECOMES = b'"code":"policy_denied"', b'"code":"policy_waived"'


class NothingToForge(Exception):
    """The request has no denial in this database."""


def copy_database(source: Path, target: Path) -> None:
    """Copy a SQLite database that is in use, as one consistent state."""
    live = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
    try:
        copied = sqlite3.connect(target)
        try:
            live.backup(copied)
            copied.execute("PRAGMA journal_mode=DELETE")
        finally:
            copied.close()
    finally:
        live.close()


def forge_denial(database: Path, request_id: str) -> int:
    """Edit the denial of `request_id` in the copy; return the leaf index of what was edited.

    Raises:
        NothingToForge: there is no such denial.
    """
    connection = sqlite3.connect(database)
    try:
        with connection:
            for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                connection.execute(f'DROP TRIGGER "{trigger}"')
            row = connection.execute(_DENIAL, (request_id,)).fetchone()
            if row is None or _WAS not in row[3]:
                raise NothingToForge("the request was not denied by a policy")
            forged = row[3].replace(_WAS, _BECOMES)
            connection.execute(_EDIT, (forged, leaf_hash(forged), *row[:3]))
    finally:
        connection.close()
    return int(row[4])


_DENIAL = """
    SELECT l.log, l.writer, l.writer_seq, l.bytes, n.leaf_index
    FROM leaf l JOIN leaf_number n USING (log, writer, writer_seq)
    WHERE l.request_id = ? AND l.type = 'request.denied'
"""
_EDIT = "UPDATE leaf SET bytes = ?, leaf_hash = ? WHERE log = ? AND writer = ? AND writer_seq = ?"
