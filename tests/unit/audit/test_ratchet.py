"""The ratchet: forward only, durable, and believed over the database."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.canonical import leaf_hash
from audit.checkpoint import Checkpoint, sign_checkpoint
from audit.merkle import EMPTY_ROOT, root_of
from audit.note import Signer
from audit.ratchet import (
    Ratchet,
    RatchetAhead,
    RatchetDiverged,
    RatchetError,
    RatchetMissing,
    RatchetUnreadable,
)

ORIGIN, OTHER = "probity.example/acme-bank", "probity.example/globex-health"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LEAVES = [leaf_hash(bytes([number])) for number in range(20)]


def _root_at(size: int) -> bytes:
    return root_of(LEAVES[:size])


def _note(size: int, origin: str = ORIGIN, root: bytes | None = None) -> str:
    checkpoint = Checkpoint(origin, size, _root_at(size) if root is None else root)
    return sign_checkpoint(checkpoint, Signer(origin, KEY))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ratchet"


def test_a_log_that_was_never_signed_may_have_any_size(path: Path) -> None:
    ratchet = Ratchet.create(path)
    assert ratchet.last(ORIGIN) is None
    ratchet.check(ORIGIN, 0, _root_at)
    ratchet.check(ORIGIN, 5, _root_at)


def test_what_was_signed_last_is_held_across_a_restart(path: Path) -> None:
    Ratchet.create(path).advance([_note(3), _note(5, OTHER), _note(7)])
    ratchet = Ratchet.load(path)
    assert ratchet.origins == (ORIGIN, OTHER)
    assert ratchet.last(ORIGIN) == Checkpoint(ORIGIN, 7, _root_at(7))
    assert ratchet.note(ORIGIN) == _note(7)
    assert ratchet.last(OTHER) == Checkpoint(OTHER, 5, _root_at(5))


def test_a_database_behind_the_ratchet_is_refused_by_name(path: Path) -> None:
    Ratchet.create(path).advance([_note(7)])
    ratchet = Ratchet.load(path)
    for size in range(7):
        with pytest.raises(RatchetAhead, match=r"database behind the ratchet: `probity\.example/acme-bank`"):
            ratchet.check(ORIGIN, size, _root_at)
    for size in range(7, 20):
        ratchet.check(ORIGIN, size, _root_at)


def test_a_rewritten_history_of_any_greater_size_is_refused(path: Path) -> None:
    ratchet = Ratchet.create(path)
    ratchet.advance([_note(7)])
    forged = [LEAVES[1], *LEAVES[1:]]
    for size in range(7, 20):
        with pytest.raises(RatchetDiverged):
            ratchet.check(ORIGIN, size, lambda at: root_of(forged[:at]))


def test_the_ratchet_never_goes_back(path: Path) -> None:
    ratchet = Ratchet.create(path)
    ratchet.advance([_note(7)])
    before = path.read_bytes()
    with pytest.raises(RatchetAhead):
        ratchet.advance([_note(9, OTHER), _note(6)])
    with pytest.raises(RatchetDiverged):
        ratchet.advance([_note(9, OTHER), _note(7, root=_root_at(8))])
    assert path.read_bytes() == before
    assert ratchet.last(OTHER) is None
    ratchet.advance([_note(7)])
    assert path.read_bytes() == before


def test_an_empty_log_that_was_signed_binds_to_nothing(path: Path) -> None:
    ratchet = Ratchet.create(path)
    ratchet.advance([_note(0, root=EMPTY_ROOT)])
    ratchet.check(ORIGIN, 0, _root_at)
    ratchet.check(ORIGIN, 4, _root_at)


def test_the_file_is_private_and_leaves_nothing_beside_it(path: Path) -> None:
    ratchet = Ratchet.create(path)
    for size in range(1, 6):
        ratchet.advance([_note(size)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["ratchet"]


def test_a_ratchet_is_created_once(path: Path) -> None:
    Ratchet.create(path)
    with pytest.raises(RatchetError, match="created once"):
        Ratchet.create(path)


def test_a_missing_ratchet_is_not_an_empty_one(path: Path) -> None:
    with pytest.raises(RatchetMissing):
        Ratchet.load(path)


def test_a_write_that_fails_leaves_the_old_ratchet_standing(path: Path) -> None:
    ratchet = Ratchet.create(path)
    ratchet.advance([_note(3)])
    path.unlink()
    path.mkdir()  # what is in the way cannot be replaced
    with pytest.raises(OSError, match="directory"):
        ratchet.advance([_note(4)])
    assert ratchet.last(ORIGIN) == Checkpoint(ORIGIN, 3, _root_at(3))
    assert [entry.name for entry in path.parent.iterdir()] == ["ratchet"]


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "null",
        "not json",
        "",
        json.dumps({"origin": ORIGIN, "note": "no note"}),
        json.dumps({"origin": ORIGIN, "note": 7}),
        json.dumps({"origin": OTHER, "note": _note(3)}),
        json.dumps({"origin": ORIGIN, "note": _note(3)}),  # members not in our order
    ],
)
def test_a_file_that_is_no_ratchet_is_refused(path: Path, content: str) -> None:
    path.write_text(f"probity/ratchet/v1 1\n{content}\n")
    with pytest.raises(RatchetUnreadable):
        Ratchet.load(path)


def test_a_ratchet_cut_off_anywhere_is_refused(path: Path) -> None:
    Ratchet.create(path).advance([_note(3), _note(5, OTHER)])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RatchetUnreadable):
            Ratchet.load(path)


def test_a_ratchet_with_a_log_taken_out_is_refused(path: Path) -> None:
    Ratchet.create(path).advance([_note(3), _note(5, OTHER)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(RatchetUnreadable, match="cut off"):
        Ratchet.load(path)
