"""Key files, wrapped data keys, pseudonyms."""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path

import pytest

from audit.keys import (
    FileKeyEncryption,
    KeyFileExists,
    KeyFileExposed,
    KeyFileMalformed,
    KeyFileMissing,
    KeyRefused,
    Keyring,
    WrappedKeyRefused,
    pseudonym,
    read_key,
)

KINDS = ("master", "pseudonym", "signing")
DATA_KEY = bytes(range(32))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys"


def test_created_keys_are_private_and_load_again(directory: Path) -> None:
    created = Keyring.create(directory)
    loaded = Keyring.load(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert sorted(path.name for path in directory.iterdir()) == [f"{kind}.key" for kind in KINDS]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())
    assert loaded.verifier("a") == created.verifier("a")
    assert loaded.pseudonym("t", "subject", "mia") == created.pseudonym("t", "subject", "mia")
    assert loaded.encryption.unwrap("t", created.encryption.wrap("t", DATA_KEY)) == DATA_KEY


def test_created_keys_are_private_under_any_umask(directory: Path) -> None:
    before = os.umask(0)
    try:
        Keyring.create(directory)
    finally:
        os.umask(before)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())


def test_every_key_is_another(directory: Path) -> None:
    Keyring.create(directory)
    assert len({read_key(directory, kind) for kind in KINDS}) == 3


def test_keys_are_never_overwritten(directory: Path) -> None:
    Keyring.create(directory)
    before = [read_key(directory, kind) for kind in KINDS]
    with pytest.raises(KeyFileExists):
        Keyring.create(directory)
    assert [read_key(directory, kind) for kind in KINDS] == before
    assert [path.name for path in directory.parent.iterdir()] == ["keys"]


def test_an_empty_directory_may_stand_where_keys_are_created(directory: Path) -> None:
    directory.mkdir(parents=True)
    assert Keyring.create(directory).verifier("a") == Keyring.load(directory).verifier("a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_is_named(directory: Path, kind: str) -> None:
    Keyring.create(directory)
    (directory / f"{kind}.key").unlink()
    with pytest.raises(KeyFileMissing, match=rf"`{kind}\.key`"):
        Keyring.load(directory)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601, 0o610])
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_others_may_touch_is_refused(directory: Path, kind: str, mode: int) -> None:
    Keyring.create(directory)
    (directory / f"{kind}.key").chmod(mode)
    with pytest.raises(KeyFileExposed, match=rf"`{kind}\.key` has mode {mode:04o}"):
        Keyring.load(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_this_key_is_refused_without_showing_it(directory: Path, kind: str) -> None:
    Keyring.create(directory)
    path = directory / f"{kind}.key"
    whole = path.read_text()
    digits = whole.split()[1]
    other = "signing" if kind == "master" else "master"
    for wrong in (
        "",
        digits,
        whole[:-2] + "\n",
        whole[:-3] + "\n",
        whole.strip() + "00\n",
        whole.replace("v1", "v2"),
        whole.replace(kind, other),
        whole.replace(digits, "zz" * 32),
        whole * 2,
        "x" * 5000,
        "\xff" * 80,
    ):
        path.write_text(wrong)
        with pytest.raises(KeyFileMalformed, match=rf"`{kind}\.key`") as caught:
            Keyring.load(directory)
        assert digits[:8] not in str(caught.value)


def test_a_wrapped_key_unwraps_for_its_tenant_alone() -> None:
    encryption = FileKeyEncryption(bytes(32))
    wrapped = encryption.wrap("acme-bank", DATA_KEY)
    assert len(wrapped) == 80
    assert FileKeyEncryption(bytes(32)).unwrap("acme-bank", wrapped) == DATA_KEY
    for tenant in ("globex-health", "acme-ban", "acme-bankx", ""):
        with pytest.raises(WrappedKeyRefused):
            encryption.unwrap(tenant, wrapped)
    with pytest.raises(WrappedKeyRefused):
        FileKeyEncryption(b"\1" * 32).unwrap("acme-bank", wrapped)


def test_no_changed_bit_and_no_other_length_of_a_wrapped_key_is_accepted() -> None:
    encryption = FileKeyEncryption(bytes(32))
    wrapped = encryption.wrap("t", DATA_KEY)
    for bit in range(8 * len(wrapped)):
        changed = bytearray(wrapped)
        changed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(WrappedKeyRefused):
            encryption.unwrap("t", bytes(changed))
    for length in range(len(wrapped)):
        with pytest.raises(WrappedKeyRefused):
            encryption.unwrap("t", wrapped[:length])


def test_wrapping_twice_shows_no_likeness_and_never_the_key() -> None:
    encryption = FileKeyEncryption(bytes(32))
    wrapped = [encryption.wrap("t", DATA_KEY) for _ in range(50)]
    assert max(Counter(wrapped).values()) == 1
    assert not any(DATA_KEY in one for one in wrapped)


def test_tenants_beyond_the_cache_still_unwrap() -> None:
    encryption = FileKeyEncryption(bytes(32))
    wrapped = [encryption.wrap(f"t{number}", DATA_KEY) for number in range(1030)]
    assert all(encryption.unwrap(f"t{number}", one) == DATA_KEY for number, one in enumerate(wrapped))


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_master_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(KeyFileMalformed):
        FileKeyEncryption(bytes(length))


def test_a_pseudonym_is_the_written_definition() -> None:
    # Computed once with OpenSSL's HMAC-SHA256 over the bytes of the docstring.
    assert pseudonym(bytes(32), "acme-bank", "subject", "mia@acme.example") == "60236e54eb571f750d6773863fbee3a9"


def test_pseudonyms_link_within_one_tenant_and_kind_only() -> None:
    same = pseudonym(b"k" * 32, "acme-bank", "subject", "mia")
    assert same == pseudonym(b"k" * 32, "acme-bank", "subject", "mia")
    others = [
        pseudonym(b"j" * 32, "acme-bank", "subject", "mia"),
        pseudonym(b"k" * 32, "globex-health", "subject", "mia"),
        pseudonym(b"k" * 32, "acme-bank", "source", "mia"),
        pseudonym(b"k" * 32, "acme-bank", "subject", "Mia"),
        pseudonym(b"k" * 32, "acme-ban", "ksubject", "mia"),
        pseudonym(b"k" * 32, "acme-bank", "subject", "\ud800"),
    ]
    assert len({same, *others}) == 7
    assert all(len(one) == 32 for one in others)
    for tenant, kind in (("a\0b", "c"), ("a", "b\0c")):
        with pytest.raises(ValueError, match="zero byte"):
            pseudonym(b"k" * 32, tenant, kind, "mia")


def test_the_signer_of_a_log_bears_its_name(directory: Path) -> None:
    keyring = Keyring.create(directory, lambda count: b"7" * count)
    assert keyring.signer("probity.example/t").verifier == keyring.verifier("probity.example/t")
    assert keyring.verifier("probity.example/t").name == "probity.example/t"
    assert keyring.verifier("probity.example/t").key_id != keyring.verifier("probity.example/u").key_id


def test_a_keyring_shows_no_key(directory: Path) -> None:
    keyring = Keyring.create(directory)
    for kind in KINDS:
        key = read_key(directory, kind)
        assert key.hex() not in repr(keyring)
        assert repr(key) not in repr(keyring)
    assert issubclass(KeyFileExposed, KeyRefused)
