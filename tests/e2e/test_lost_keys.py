"""A database whose keys and ratchet are gone, or another's, is not started on: new ones would hide what was cut off, or
write what nobody could read or believe.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from audit.keys import KeyFileMissing, KeysOfAnother, WrappedKeyRefused
from audit.keystore import KeyStoreMissing
from audit.ratchet import Ratchet, RatchetBehind, RatchetMissing
from audit.verify import main as verify
from gateway.start_refusal import START_REFUSALS
from tests.support.gateway import running_gateway
from tests.support.officers import Hand
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


@pytest.mark.parametrize(
    ("kind", "refusal"), [("master", WrappedKeyRefused), ("pseudonym", KeysOfAnother), ("signing", KeysOfAnother)]
)
def test_a_key_that_is_whole_and_another_s_is_refused_before_anything_is_written(
    tmp_path: Path, kind: str, refusal: type[Exception]
) -> None:
    with running_gateway(tmp_path, ScriptedEngine()) as gateway:
        asking = Hand(gateway, "app")
        asking.ask("hello")
    trusted = (tmp_path / "trust").read_bytes()
    (tmp_path / "keys" / f"{kind}.key").write_text(f"probity/{kind}-key/v1 {'5e' * 32}\n")
    with pytest.raises(refusal, match="key"), running_gateway(tmp_path, ScriptedEngine()):
        pass
    assert (tmp_path / "trust").read_bytes() == trusted
    assert verify([f"sqlite:///{tmp_path}/probity.sqlite3", "--trust", str(tmp_path / "trust")]) == 0


def test_a_key_store_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    for file in tmp_path.glob("keystore*"):
        file.unlink()
    with pytest.raises(KeyStoreMissing, match="restore it"), running_gateway(tmp_path, ScriptedEngine()):
        pass
    assert not list(tmp_path.glob("keystore*"))


def test_a_ratchet_that_was_emptied_or_is_an_old_one_is_refused(tmp_path: Path) -> None:
    """With it, a database restored from a backup would be taken for whole the next time."""
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    old = (tmp_path / "ratchet").read_bytes()
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    for content in (old, b"probity/ratchet/v1 0\n"):
        (tmp_path / "ratchet").write_bytes(content)
        with pytest.raises(RatchetBehind, match="put the last one back"), running_gateway(tmp_path, ScriptedEngine()):
            pass


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
    for file in tmp_path.glob("probity.sqlite3*"):
        file.unlink()
    with pytest.raises(KeyFileMissing, match="restore the keys"), running_gateway(tmp_path, ScriptedEngine()):
        pass


def test_keys_without_their_ratchet_are_refused_even_on_an_empty_database(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    (tmp_path / "ratchet").unlink()
    for file in tmp_path.glob("probity.sqlite3*"):
        file.unlink()
    with pytest.raises(RatchetMissing), running_gateway(tmp_path, ScriptedEngine()):
        pass


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_whatever_the_umask_secrets_are_made_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):  # and it starts on what it made
            with running_gateway(tmp_path, ScriptedEngine()) as gateway:
                Hand(gateway, "app").ask("hello")
                modes = {path.name: path.stat().st_mode & 0o777 for path in _secrets(tmp_path)}
    finally:
        os.umask(before)
    assert len(modes) >= 6
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("name", ["keystore.sqlite3", "ratchet", "keys/master.key", "keys/signing.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_secret_that_others_may_read_or_write_is_refused_with_what_to_do(
    tmp_path: Path, name: str, mode: int
) -> None:
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    (tmp_path / name).chmod(mode)
    with pytest.raises(START_REFUSALS) as refused, running_gateway(tmp_path, ScriptedEngine()):
        pass
    assert f"mode {mode:04o}" in str(refused.value)
    assert f"run `chmod 600 {Path(name).name}`" in str(refused.value)
    (tmp_path / name).chmod(0o600)
    with running_gateway(tmp_path, ScriptedEngine()):
        pass


def _secrets(directory: Path) -> list[Path]:
    return [*directory.glob("keystore*"), *directory.glob("keys/*"), directory / "ratchet"]


def test_an_auditors_copy_of_the_ratchet_may_lie_open(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine()):
        pass
    (tmp_path / "ratchet").chmod(0o644)
    held = ["--trust", str(tmp_path / "trust"), "--checkpoint", str(tmp_path / "ratchet")]
    assert verify([f"sqlite:///{tmp_path}/probity.sqlite3", *held]) == 0
