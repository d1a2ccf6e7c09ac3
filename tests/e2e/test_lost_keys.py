"""A database whose keys and ratchet are gone is not started on: new ones would hide what was cut off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from audit.keys import KeyFileMissing
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
