"""A database whose keys and ratchet are gone is not started on: new ones would hide what was cut off."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from audit.keys import KeyFileMissing
from audit.ratchet import Ratchet, RatchetMissing
from tests.support.gateway import running_gateway
from tests.support.scripted_engine import ScriptedEngine


def test_a_log_that_lost_its_keys_and_its_ratchet_is_refused_and_neither_is_made_anew(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    shutil.rmtree(tmp_path / "keys")
    (tmp_path / "ratchet").unlink()
    with pytest.raises(KeyFileMissing, match="restore the keys"), running_gateway(tmp_path, ScriptedEngine()):
        pass
    assert not (tmp_path / "keys").exists()
    assert not (tmp_path / "ratchet").exists()


def test_a_first_start_that_was_cut_off_is_begun_again(tmp_path: Path) -> None:
    """What a crash leaves: the empty ratchet, and keys that were not moved to their place."""
    Ratchet.create(tmp_path / "ratchet")
    unfinished = tmp_path / f".keys.{os.getpid()}.new"
    unfinished.mkdir()
    (unfinished / "master.key").write_text("half a k")
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    assert not unfinished.exists()
    with running_gateway(tmp_path, ScriptedEngine()):
        pass


def test_a_database_and_its_keys_both_lost_are_not_begun_again_under_a_ratchet_that_remembers(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    shutil.rmtree(tmp_path / "keys")
    for file in tmp_path.glob("*.db*"):
        file.unlink()
    with pytest.raises(KeyFileMissing, match="restore the keys"), running_gateway(tmp_path, ScriptedEngine()):
        pass


def test_keys_without_their_ratchet_are_refused_even_on_an_empty_database(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    (tmp_path / "ratchet").unlink()
    for file in tmp_path.glob("*.db*"):
        file.unlink()
    with pytest.raises(RatchetMissing), running_gateway(tmp_path, ScriptedEngine()):
        pass
