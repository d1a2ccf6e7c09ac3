"""`verify` against a real log whose file was changed by someone with every right: each attack is caught and named."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import String, func, select

from audit.canonical import leaf_hash
from audit.checkpoint import Checkpoint, read_checkpoint, sign_checkpoint
from audit.database import reader_engine
from audit.keys import Keyring
from audit.leaf import Leaf
from audit.merkle import Frontier
from audit.ratchet import Ratchet
from audit.tables import leaf, request_index
from audit.trust import read_trust, write_trust
from audit.verification import Report, Wrong, snapshot, verify
from audit.verify import main
from tests.support.ledger import ACME, GLOBEX, Ledger, Tamper

LOG, OTHER = "probity.test/acme-bank", "probity.test/globex-health"
REQUESTS = 140  # two leaves each: a full tile and some more


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of one writer's 281 leaves with several checkpoints, and a second writer's few."""
    directory = tmp_path_factory.mktemp("original")
    ledger = Ledger(directory)
    with ledger:
        for _ in range(REQUESTS):
            ledger.ask()
        ledger.ask(GLOBEX)
    with ledger:
        ledger.ask()
        ledger.deny()
        ledger.fail(ledger.receive())
        ledger.note(ACME, role="auditor")
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """A copy to be tampered with."""
    shutil.copytree(original, tmp_path / "log")
    return tmp_path / "log"


def _verify(directory: Path, *held: str, logs: list[str] | None = None) -> Report:
    engine = reader_engine(f"sqlite:///{directory}/audit.db")
    try:
        return verify(engine, read_trust(directory / "trust.txt"), held, logs)
    finally:
        engine.dispose()


def _wrong(directory: Path, *held: str) -> Wrong:
    found = _verify(directory, *held).first_wrong
    assert found is not None
    return found


def _size(directory: Path, log: str = LOG) -> int:
    with Tamper(directory / "audit.db") as tamper:
        size = tamper.one("SELECT size FROM head WHERE log = :log", log=log)[0]
    assert isinstance(size, int)
    return size


def _signed_size(directory: Path) -> int:
    """Return the size of the newest checkpoint but the last one."""
    with Tamper(directory / "audit.db") as tamper:
        rows = tamper.connection.execute("SELECT tree_size FROM checkpoint WHERE log = ? ORDER BY tree_size", (LOG,))
        return int(rows.fetchall()[-2][0])


def _forge(tamper: Tamper, index: int, **changes: object) -> None:
    """Change a leaf together with its stored hash, as well as one can without the key."""
    forged = replace(tamper.leaf(LOG, index), **changes).encode()  # type: ignore[arg-type]
    tamper.rewrite(LOG, index, {"bytes": forged, "leaf_hash": leaf_hash(forged)})


def _rechain(tamper: Tamper, begin: int) -> None:
    """Make every later leaf of the writer follow from the changed one."""
    writer, seq = tamper.one(
        "SELECT writer, writer_seq FROM leaf_number WHERE log = :l AND leaf_index = :i", l=LOG, i=begin
    )
    query = "SELECT rowid, bytes FROM leaf WHERE log = ? AND writer = ? AND writer_seq >= ? ORDER BY writer_seq"
    prev = None
    for row, stored in tamper.connection.execute(query, (LOG, writer, seq)).fetchall():
        parsed = Leaf.parse(stored)
        new = (parsed if prev is None else replace(parsed, prev=prev)).encode()
        prev = leaf_hash(new).hex()
        tamper.run("UPDATE leaf SET bytes = :b, leaf_hash = :h WHERE rowid = :r", b=new, h=bytes.fromhex(prev), r=row)


def _rebuild(tamper: Tamper) -> bytes:
    """Rebuild tiles and head from the leaves; return the new root."""
    query = (
        "SELECT leaf_hash FROM leaf JOIN leaf_number USING (log, writer, writer_seq) WHERE leaf_number.log = ? "
        "ORDER BY leaf_index"
    )
    hashes = [row[0] for row in tamper.connection.execute(query, (LOG,))]
    frontier = Frontier.of(hashes)
    tamper.run("UPDATE tile SET hashes = :h WHERE log = :l", h=b"".join(hashes[:256]), l=LOG)
    tamper.run("UPDATE head SET size = :s, frontier = :f WHERE log = :l", s=frontier.size, f=frontier.to_bytes(), l=LOG)
    return frontier.root()


def test_an_untouched_log_is_verified_and_counted(directory: Path) -> None:
    report = _verify(directory)
    assert report.first_wrong is None
    assert [log.log for log in report.logs] == [LOG, OTHER, "probity.test/system"]
    acme = report.logs[0]
    assert (acme.leaves, acme.writers, acme.unnumbered, acme.open_requests) == (287, 2, 0, 0)
    assert acme.signed_size == acme.leaves
    assert acme.parts == 141 * 5 + 2 + 4


@pytest.mark.parametrize("index", [0, 1, 100, 255, 256, 280, 286])
def test_edited_bytes_are_named_by_their_leaf(directory: Path, index: int) -> None:
    with Tamper(directory / "audit.db") as tamper:
        stored = tamper.leaf(LOG, index).encode()
        tamper.rewrite(LOG, index, {"bytes": stored.replace(b'"v":1', b'"v":2')})
    assert _wrong(directory) == Wrong(LOG, index, "the bytes do not have the stored hash")


@pytest.mark.parametrize("index", [0, 1, 100, 255, 256, 279, 285])
def test_a_leaf_edited_with_its_hash_is_named_though_its_row_agrees_with_itself(directory: Path, index: int) -> None:
    with Tamper(directory / "audit.db") as tamper:
        _forge(tamper, index, body={"forged": True})
    assert _wrong(directory).index == index


@pytest.mark.parametrize("index", [280, 286])
def test_the_last_leaf_of_a_writer_edited_with_its_hash_is_caught_by_the_signed_root(
    directory: Path, index: int
) -> None:
    with Tamper(directory / "audit.db") as tamper:
        _forge(tamper, index, body={"forged": True})
    found = _wrong(directory)
    assert found.index is not None
    assert found.index <= index
    assert f"up to {index}, was changed" in found.reason or found.index == index


@pytest.mark.parametrize("index", [100, 255, 270])
def test_a_leaf_edited_with_all_that_follow_it_is_caught_by_the_signed_root(directory: Path, index: int) -> None:
    with Tamper(directory / "audit.db") as tamper:
        _forge(tamper, index, body={"forged": True})
        _rechain(tamper, index)
        _rebuild(tamper)
    found = _wrong(directory)
    assert found.index is not None
    assert found.index <= index
    assert "signed" in found.reason


def test_a_prev_that_was_changed_names_the_leaf_that_holds_it_once_the_one_before_is_signed(directory: Path) -> None:
    first = _signed_size(directory)
    with Tamper(directory / "audit.db") as tamper:
        writer_seq = tamper.leaf(LOG, first).writer_seq
    if writer_seq == 0:
        first += 1
    with Tamper(directory / "audit.db") as tamper:
        _forge(tamper, first, prev="ab" * 32)
    assert _wrong(directory).index in (first - 1, first)


@pytest.mark.parametrize(
    "stored", [b"", b"{}", b"not json", b'{"v":1}', b'{"v":1.0}', b"[" * 30_000, b'{"a":1,"a":1}', b"\xff"]
)
def test_bytes_that_are_no_leaf_are_refused_though_their_hash_is_right(directory: Path, stored: bytes) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.rewrite(LOG, 7, {"bytes": stored, "leaf_hash": leaf_hash(stored)})
    assert _wrong(directory).index == 7


@pytest.mark.parametrize(
    ("column", "value"),
    [("type", "audit.read"), ("request_id", None), ("record_id", "x"), ("time", 0)],
)
def test_a_column_that_contradicts_its_leaf_is_named(directory: Path, column: str, value: object) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.rewrite(LOG, 9, {column: value})
    assert _wrong(directory) == Wrong(LOG, 9, "a column of the row says something else than the leaf")


@pytest.mark.parametrize("index", [0, 5, 286])
def test_a_deleted_leaf_is_named(directory: Path, index: int) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run(
            "DELETE FROM leaf WHERE rowid = (SELECT leaf.rowid FROM leaf JOIN leaf_number USING (log, writer, "
            "writer_seq) WHERE leaf_number.log = :l AND leaf_index = :i)", l=LOG, i=index,
        )  # fmt: skip
    found = _wrong(directory)
    assert found.index == index
    assert "missing" in found.reason


@pytest.mark.parametrize("index", [0, 5])
def test_a_deleted_leaf_number_is_named(directory: Path, index: int) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("DELETE FROM leaf_number WHERE log = :l AND leaf_index = :i", l=LOG, i=index)
    assert _wrong(directory) == Wrong(LOG, index, "the leaf index is missing")


def test_two_leaves_that_changed_places_are_caught(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        for old, new in ((30, -1), (31, 30), (-1, 31)):
            tamper.run("UPDATE leaf_number SET leaf_index = :n WHERE log = :l AND leaf_index = :o", l=LOG, o=old, n=new)
    assert _wrong(directory).index == 30


def _truncate(tamper: Tamper, size: int, *, checkpoints: bool) -> None:
    """Cut a log back to `size` leaves, and make all that is mutable fit."""
    tamper.run(
        "DELETE FROM content WHERE record_id IN (SELECT record_id FROM leaf JOIN leaf_number USING (log, writer, "
        "writer_seq) WHERE leaf_number.log = :l AND leaf_index >= :s)", l=LOG, s=size,
    )  # fmt: skip
    tamper.run(
        "DELETE FROM leaf WHERE rowid IN (SELECT leaf.rowid FROM leaf JOIN leaf_number USING (log, writer, writer_seq) "
        "WHERE leaf_number.log = :l AND leaf_index >= :s)", l=LOG, s=size,
    )  # fmt: skip
    tamper.run("DELETE FROM leaf_number WHERE log = :l AND leaf_index >= :s", l=LOG, s=size)
    tamper.run(
        "UPDATE chain SET appended = (SELECT COUNT(*) FROM leaf WHERE leaf.log = chain.log AND "
        "leaf.writer = chain.writer)"
    )
    tamper.run("UPDATE chain SET numbered = appended")
    tamper.run(
        "DELETE FROM request_index WHERE request_id NOT IN (SELECT request_id FROM leaf WHERE request_id NOT NULL)"
    )
    tamper.run(
        "UPDATE request_index SET status = 'received', code = NULL, completed_at = NULL, completion_tokens = NULL "
        "WHERE status <> 'denied' AND (SELECT COUNT(*) FROM leaf WHERE leaf.request_id = request_index.request_id) < 2"
    )
    if checkpoints:
        tamper.run("DELETE FROM checkpoint WHERE log = :l AND tree_size > :s", l=LOG, s=size)
    _rebuild(tamper)


def test_a_tail_cut_off_is_caught_by_the_stored_checkpoint(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        _truncate(tamper, 285, checkpoints=False)
    found = _wrong(directory)
    assert found.index == 285
    assert "its tail is missing" in found.reason


def test_a_tail_cut_off_with_its_checkpoints_is_caught_by_one_the_auditor_kept(directory: Path) -> None:
    kept = Ratchet.load(directory / "ratchet").note(LOG)
    assert kept is not None
    size = _signed_size(directory)
    with Tamper(directory / "audit.db") as tamper:
        _truncate(tamper, size, checkpoints=True)
    assert _verify(directory).first_wrong is None, "without a kept checkpoint nothing can show it"
    found = _wrong(directory, kept)
    assert (found.log, found.index) == (LOG, size)


def test_a_history_rewritten_and_signed_anew_is_caught_by_a_kept_checkpoint(directory: Path) -> None:
    kept = Ratchet.load(directory / "ratchet").note(LOG)
    assert kept is not None
    signer = Keyring.load(directory / "keys").signer(LOG)
    with Tamper(directory / "audit.db") as tamper:
        _forge(tamper, 20, nonce="0" * 32)
        _rechain(tamper, 20)
        root = _rebuild(tamper)
        forged = Checkpoint(LOG, read_checkpoint(kept).size, root)
        tamper.run("DELETE FROM checkpoint WHERE log = :l", l=LOG)
        tamper.run(
            "INSERT INTO checkpoint VALUES (:l, :s, :r, :n, 0)", l=LOG, s=forged.size, r=root,
            n=sign_checkpoint(forged, signer),
        )  # fmt: skip
    assert _verify(directory).first_wrong is None, "whoever has the signing key can sign another history"
    assert "signed" in _wrong(directory, kept).reason


def test_a_checkpoint_of_another_key_is_refused(directory: Path, tmp_path: Path) -> None:
    stranger = Keyring.create(tmp_path / "stranger")
    write_trust(directory / "trust.txt", [stranger.verifier(log) for log in (LOG, OTHER, "probity.test/system")])
    found = _wrong(directory)
    assert found.log == LOG
    assert "not signed by any key" in found.reason


@pytest.mark.parametrize(
    "statement", ["note = replace(note, '2', '3')", "root = zeroblob(32)", "tree_size = tree_size - 1"]
)
def test_a_changed_checkpoint_is_refused(directory: Path, statement: str) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run(f"UPDATE checkpoint SET {statement} WHERE log = :l AND tree_size = 287", l=LOG)
    assert "checkpoint" in _wrong(directory).reason


def test_a_log_without_any_checkpoint_proves_nothing(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("DELETE FROM checkpoint WHERE log = :l", l=LOG)
    assert "nothing can be proved" in _wrong(directory).reason


def test_a_log_the_trust_file_does_not_know_is_not_verified(directory: Path) -> None:
    keyring = Keyring.load(directory / "keys")
    write_trust(directory / "trust.txt", [keyring.verifier(LOG)])
    assert _wrong(directory).log == OTHER
    assert _verify(directory, logs=[LOG]).first_wrong is None


def test_a_whole_log_taken_out_is_missed(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        for table in ("leaf", "leaf_number", "tile", "checkpoint", "content", "head", "chain"):
            tamper.run(f"DELETE FROM {table} WHERE log = :l", l=OTHER)
    assert _wrong(directory) == Wrong(OTHER, None, "the log is not in this database")


@pytest.mark.parametrize(
    "change",
    ["ciphertext = CAST(ciphertext || x'00' AS BLOB)", "nonce = zeroblob(12)", "ciphertext = x''", "log = 'x'"],
)
def test_changed_content_is_named_by_its_leaf(directory: Path, change: str) -> None:
    with Tamper(directory / "audit.db") as tamper:
        record = tamper.leaf(LOG, 61).record
        assert tamper.run(f"UPDATE content SET {change} WHERE record_id = :r AND part = 'prompt'", r=record) == 1
    found = _wrong(directory)
    assert found.index == 61
    assert "`prompt`" in found.reason


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE leaf SET bytes = 'text' WHERE writer_seq = 3",
        "UPDATE leaf SET leaf_hash = 7 WHERE writer_seq = 3",
        "UPDATE leaf SET leaf_hash = 1e300 WHERE writer_seq = 3",
        "UPDATE leaf SET leaf_hash = 4611686018427387904 WHERE writer_seq = 3",
        "UPDATE leaf SET type = x'ff', time = 'never' WHERE writer_seq = 3",
        "UPDATE leaf_number SET leaf_index = 'three' WHERE leaf_index = 3",
        "UPDATE content SET nonce = 3",
        "UPDATE content SET ciphertext = ciphertext || x'00'",
        "UPDATE tile SET hashes = 'text'",
        "UPDATE checkpoint SET note = x'ff'",
        "UPDATE checkpoint SET note = 5",
        "UPDATE checkpoint SET root = 'text'",
        "UPDATE head SET frontier = 5, size = 'many'",
        "UPDATE chain SET appended = 'many'",
    ],
)
def test_a_value_of_another_type_is_wrong_and_stops_nothing(directory: Path, statement: str) -> None:
    with Tamper(directory / "audit.db") as tamper:
        assert tamper.run(statement) > 0
    assert _wrong(directory).log == LOG


def test_missing_content_is_named_by_its_leaf(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        for index in (62, 70):
            tamper.run("DELETE FROM content WHERE record_id = :r AND part = 'output'", r=tamper.leaf(LOG, index).record)
    assert _wrong(directory) == Wrong(LOG, 62, "the content of part `output` is missing")


def test_content_of_an_earlier_leaf_is_named_before_a_later_damaged_leaf(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("DELETE FROM content WHERE record_id = :r AND part = 'output'", r=tamper.leaf(LOG, 2).record)
        tamper.rewrite(LOG, 5, {"leaf_hash": bytes(32)})
    assert _wrong(directory).index == 2


def test_content_no_leaf_commits_to_is_seen(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run(
            "INSERT INTO content SELECT record_id, 'planted', log, key_id, nonce, ciphertext FROM content LIMIT 1"
        )
        tamper.run("UPDATE content SET log = :l WHERE part = 'planted'", l=LOG)
    assert "no leaf commits" in _wrong(directory).reason


@pytest.mark.parametrize("at", [0, 100, 255])
def test_a_changed_tile_is_seen(directory: Path, at: int) -> None:
    with Tamper(directory / "audit.db") as tamper:
        stored = tamper.one("SELECT hashes FROM tile WHERE log = :l", l=LOG)[0]
        assert isinstance(stored, bytes)
        changed = stored[: at * 32] + hashlib.sha256(b"x").digest() + stored[at * 32 + 32 :]
        tamper.run("UPDATE tile SET hashes = :h WHERE log = :l", h=changed, l=LOG)
    found = _wrong(directory)
    assert found.index == at
    assert "tile 0" in found.reason


def test_a_missing_or_planted_tile_is_seen(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("INSERT INTO tile SELECT log, level, 1, hashes FROM tile WHERE log = :l", l=LOG)
    assert "more tiles" in _wrong(directory).reason
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("DELETE FROM tile WHERE log = :l", l=LOG)
    assert "tile 0 of level 0 is missing" in _wrong(directory).reason


def test_a_stored_head_that_is_not_that_of_the_leaves_is_seen(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("UPDATE head SET frontier = x'00' WHERE log = :l", l=LOG)
    assert "head" in _wrong(directory).reason


def test_a_head_of_another_tenant_is_seen(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("UPDATE head SET tenant = 'somebody-else' WHERE log = :l", l=LOG)
    assert "head" in _wrong(directory).reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("DELETE FROM chain WHERE log = :l AND appended > 200", "nothing says how many"),
        ("UPDATE chain SET numbered = numbered + 1 WHERE log = :l", "said to be numbered"),
    ],
)
def test_a_chain_that_says_otherwise_or_nothing_is_seen(directory: Path, change: str, reason: str) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.run(change, l=LOG)
    assert reason in _wrong(directory).reason


_ROW = "WHERE rowid = (SELECT rowid FROM request_index WHERE log = :l AND status = :s ORDER BY request_id LIMIT 1)"


@pytest.mark.parametrize("status", ["completed", "denied", "failed"])
def test_a_request_hidden_from_the_officers_is_named_by_its_leaf(directory: Path, status: str) -> None:
    """Nothing of the evidence is touched: who searches would only never find it."""
    with Tamper(directory / "audit.db") as tamper:
        row = tamper.one(f"SELECT request_id FROM request_index {_ROW}", l=LOG, s=status)
        tamper.run(f"DELETE FROM request_index {_ROW}", l=LOG, s=status)
    wrong = _wrong(directory)
    assert (wrong.log, wrong.index is None) == (LOG, False)
    assert wrong.reason == f"request `{row[0]}` is missing in the officers' index"


@pytest.mark.parametrize("column", [column.name for column in request_index.columns])
@pytest.mark.parametrize("status", ["completed", "denied"])
def test_an_index_that_says_something_else_than_the_leaves_is_named(directory: Path, column: str, status: str) -> None:
    other = "'x'" if isinstance(request_index.c[column].type, String) else "7"
    with Tamper(directory / "audit.db") as tamper:
        tamper.run(f"UPDATE request_index SET {column} = {other} {_ROW}", l=LOG, s=status)
    wrong = next(report.wrong for report in _verify(directory).logs if report.wrong is not None)
    assert "index" in wrong.reason or wrong.log == "x"


def test_content_said_to_have_another_key_is_seen(directory: Path) -> None:
    """It would look as if its key had been destroyed by right."""
    with Tamper(directory / "audit.db") as tamper:
        tamper.run(
            "UPDATE content SET key_id = 'gone' WHERE rowid = (SELECT MIN(rowid) FROM content WHERE log = :l)", l=LOG
        )
    assert "key_id" in _wrong(directory).reason


def _unnumber_last(tamper: Tamper, count: int) -> int:
    """Take the last leaves out of the tree, as if no sequencer had come by yet; return what is left."""
    size = int(str(tamper.one("SELECT size FROM head WHERE log = :l", l=LOG)[0])) - count
    tamper.run(
        "UPDATE chain SET numbered = numbered - (SELECT COUNT(*) FROM leaf_number AS gone WHERE gone.log = chain.log"
        " AND gone.writer = chain.writer AND gone.leaf_index >= :s) WHERE log = :l",
        l=LOG,
        s=size,
    )
    tamper.run("DELETE FROM leaf_number WHERE log = :l AND leaf_index >= :s", l=LOG, s=size)
    tamper.run("DELETE FROM checkpoint WHERE log = :l AND tree_size > :s", l=LOG, s=size)
    _rebuild(tamper)
    return size


def test_leaves_not_numbered_yet_are_counted_and_no_fault(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        size = _unnumber_last(tamper, 2)
    acme = _verify(directory).logs[0]
    assert acme.wrong is None
    assert (acme.leaves, acme.unnumbered) == (size, 2)


@pytest.mark.parametrize("seq", [5, 6])
def test_a_deleted_leaf_that_was_not_numbered_yet_is_missed(directory: Path, seq: int) -> None:
    with Tamper(directory / "audit.db") as tamper:
        _unnumber_last(tamper, 2)
        writer = tamper.one("SELECT writer FROM chain WHERE log = :l AND appended = 6", l=LOG)[0]
        last = 6 - (6 - seq) - 1
        assert (
            tamper.run("DELETE FROM leaf WHERE log = :l AND writer = :w AND writer_seq = :s", l=LOG, w=writer, s=last)
            == 1
        )
        tamper.run("DELETE FROM content WHERE record_id NOT IN (SELECT record_id FROM leaf)")
    found = _wrong(directory)
    assert str(writer) in found.reason


def test_a_request_closed_twice_is_named_by_its_last_leaf(directory: Path) -> None:
    keyring = Keyring.load(directory / "keys")
    with Tamper(directory / "audit.db") as tamper:
        tamper.run("DROP INDEX leaf_closes_once")
        size = _append_forged(tamper, keyring, closing_of=2)
    found = _wrong(directory)
    assert found.index == size - 1
    assert "closed more than once" in found.reason


def _append_forged(tamper: Tamper, keyring: Keyring, closing_of: int) -> int:
    """Append, number and sign a second closing record as a new writer; everything else fits."""
    model = tamper.leaf(LOG, closing_of)
    forged = replace(
        model, writer="f" * 16, writer_seq=0, prev="0" * 64, record="0193f0c2-7b1e-7c33-9a01-5d2f6c8e4b10", parts=()
    )
    stored = forged.encode()
    time = tamper.one("SELECT time FROM leaf WHERE record_id = :r", r=model.record)[0]
    tamper.run(
        "INSERT INTO leaf VALUES (:l, :w, 0, :h, :b, :i, :q, :t, :m)", l=LOG, w=forged.writer, h=leaf_hash(stored),
        b=stored, i=forged.record, q=forged.request, t=forged.type.value, m=time,
    )  # fmt: skip
    size = int(str(tamper.one("SELECT size FROM head WHERE log = :l", l=LOG)[0]))
    tamper.run("INSERT INTO leaf_number VALUES (:l, :i, :w, 0)", l=LOG, i=size, w=forged.writer)
    tamper.run("INSERT INTO chain VALUES (:l, :w, 1, 1)", l=LOG, w=forged.writer)
    point = Checkpoint(LOG, size + 1, _rebuild(tamper))
    tamper.run(
        "INSERT INTO checkpoint VALUES (:l, :s, :r, :n, 0)", l=LOG, s=point.size, r=point.root,
        n=sign_checkpoint(point, keyring.signer(LOG)),
    )  # fmt: skip
    return size + 1


def test_one_log_that_is_wrong_does_not_hide_another(directory: Path) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.rewrite(LOG, 9, {"leaf_hash": bytes(32)})
        tamper.rewrite(OTHER, 1, {"leaf_hash": bytes(32)})
    wrong = [(log.wrong.log, log.wrong.index) for log in _verify(directory).logs if log.wrong is not None]
    assert wrong == [(LOG, 9), (OTHER, 1)]


def test_a_log_that_is_being_written_is_verified_as_it_is_at_one_moment(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger:
        ledger.ask()
    with ledger:
        engine = reader_engine(ledger.settings.database_url)
        for _ in range(5):
            with snapshot(engine) as connection:
                before = connection.execute(select(func.count()).select_from(leaf)).scalar_one()
                request = ledger.receive()
                assert connection.execute(select(func.count()).select_from(leaf)).scalar_one() == before
            report = verify(engine, read_trust(ledger.settings.trust))
            assert report.first_wrong is None
            assert report.logs[0].open_requests == 1
            ledger.complete(request)
        engine.dispose()


# --- the command ---


@pytest.fixture
def command(directory: Path) -> list[str]:
    return [f"sqlite:///{directory}/audit.db", "--trust", str(directory / "trust.txt")]


def test_the_command_says_that_all_is_well(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "probity.test/acme-bank: 287 leaves of 2 writers" in printed.out
    assert printed.out.endswith("verified: everything that is signed is there, unchanged\n")
    assert printed.err == ""


def test_the_command_names_the_first_wrong_leaf(
    command: list[str], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tamper(directory / "audit.db") as tamper:
        tamper.rewrite(LOG, 9, {"leaf_hash": bytes(32)})
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "WRONG probity.test/acme-bank: leaf 9: the bytes do not have the stored hash\n" in printed
    assert printed.endswith("not verified: 1 of 3 logs wrong\n")


def test_the_command_takes_a_kept_note_or_a_ratchet(command: list[str], directory: Path) -> None:
    note = Ratchet.load(directory / "ratchet").note(LOG)
    assert note is not None
    (directory / "kept.note").write_text(note, encoding="utf-8")
    held = ["--checkpoint", str(directory / "kept.note"), "--checkpoint", str(directory / "ratchet")]
    assert main([*command, *held]) == 0
    with Tamper(directory / "audit.db") as tamper:
        _truncate(tamper, _signed_size(directory), checkpoints=True)
    assert main(command) == 0
    assert main([*command, *held[:2]]) == 1
    assert main([*command, *held[2:]]) == 1
    assert main([*command, *held, "--log", OTHER]) == 0


@pytest.mark.parametrize("spoil", ["trust", "missing trust", "checkpoint", "database", "url", "table", "binary"])
def test_the_command_says_when_it_cannot_try(
    command: list[str], directory: Path, spoil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    note = directory / "kept.note"
    note.write_bytes(b"\xff\xfe" if spoil == "binary" else b"no note")
    if spoil == "trust":
        (directory / "trust.txt").write_text("no trust file")
    elif spoil == "missing trust":
        (directory / "trust.txt").unlink()
    elif spoil == "database":
        (directory / "audit.db").unlink()
    elif spoil == "url":
        command[0] = "no url"
    elif spoil == "table":
        with Tamper(directory / "audit.db") as tamper:
            tamper.run("DROP TABLE tile")
    else:
        command += ["--checkpoint", str(note)]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("cannot verify: ")
    assert printed.out == ""


def test_the_command_runs_where_torch_and_web_frameworks_are_not(command: list[str]) -> None:
    blocked = ("torch", "fastapi", "starlette", "pydantic", "transformers", "numpy", "alembic", "orjson", "gateway")
    script = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from audit.verify import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified" in done.stdout


def test_the_command_is_a_module(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "audit.verify", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    usage = subprocess.run([sys.executable, "-m", "audit.verify"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
