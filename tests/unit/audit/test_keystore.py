"""The store of wrapped data keys: durable, exact, and truly forgetful."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event

from audit.keystore import (
    KeyConflict,
    KeyNotHeld,
    KeyStore,
    KeyStoreUnavailable,
    KeyStoreUnsafe,
    WrappedKey,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    store = KeyStore.open(f"sqlite:///{path}")
    yield store
    store.close()


def _key(number: int, wrapped: bytes | None = None) -> WrappedKey:
    return WrappedKey(f"key-{number:05}", "acme-bank", wrapped or bytes([number % 251, 7]) * 40)


def test_stored_keys_are_there_after_the_store_is_opened_again(path: Path, store: KeyStore) -> None:
    store.put_many([_key(number) for number in range(1200)])
    store.close()
    again = KeyStore.open(f"sqlite:///{path}")
    assert again.get("key-00007") == _key(7)
    assert again.get_many([f"key-{number:05}" for number in range(-5, 1300)]) == {
        _key(number).key_id: _key(number) for number in range(1200)
    }
    again.close()


def test_no_keys_are_no_transaction(store: KeyStore) -> None:
    store.put_many([])
    assert store.get_many([]) == {}
    assert store.destroy([]) == 0


def test_storing_again_after_a_lost_answer_is_no_error(store: KeyStore) -> None:
    store.put_many([_key(1), _key(2)])
    store.put_many([_key(1), _key(2)])
    store.put_many([_key(2), _key(3), _key(3)])
    assert len(store.get_many(["key-00001", "key-00002", "key-00003"])) == 3


def test_another_key_under_a_used_id_is_refused_and_nothing_is_stored(store: KeyStore) -> None:
    store.put_many([_key(1)])
    with pytest.raises(KeyConflict):
        store.put_many([_key(2), _key(1, b"another")])
    with pytest.raises(KeyConflict):
        store.put_many([_key(3, b"one"), _key(3, b"two")])
    assert store.get_many(["key-00001", "key-00002", "key-00003"]) == {"key-00001": _key(1)}


def test_a_destroyed_key_is_not_held(store: KeyStore) -> None:
    store.put_many([_key(number) for number in range(600)])
    assert store.destroy([f"key-{number:05}" for number in range(550)]) == 550
    assert store.destroy(["key-00001", "key-00599"]) == 1
    with pytest.raises(KeyNotHeld):
        store.get("key-00001")
    with pytest.raises(KeyNotHeld):
        store.get("never stored")
    assert store.get("key-00555") == _key(555)


def test_a_destroyed_key_is_in_no_file_any_more(path: Path, store: KeyStore) -> None:
    secret = bytes(range(1, 81))
    store.put_many([_key(number) for number in range(300)])
    store.put_many([_key(1000, secret)])
    assert any(secret in file.read_bytes() for file in path.parent.iterdir())
    store.destroy(["key-01000"])
    assert not any(secret in file.read_bytes() for file in path.parent.iterdir())


def test_the_files_of_the_store_are_private(path: Path, store: KeyStore) -> None:
    store.put_many([_key(1)])
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes) >= {"keys.db", "keys.db-wal"}
    assert set(modes.values()) == {0o600}


def test_a_database_that_forgets_is_refused() -> None:
    with pytest.raises(KeyStoreUnsafe, match="`journal_mode`"):
        KeyStore.open("sqlite://")


def test_a_database_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyStoreUnavailable):
        KeyStore.open(f"sqlite:///{tmp_path}/missing/keys.db")
    (tmp_path / "text.db").write_text("this is no database, whatever its name says " * 50)
    (tmp_path / "text.db").chmod(0o600)
    with pytest.raises(KeyStoreUnavailable):
        KeyStore.open(f"sqlite:///{tmp_path}/text.db")


def test_a_store_that_does_not_confirm_says_so(path: Path, store: KeyStore) -> None:
    engine = create_engine(f"sqlite:///{path}", hide_parameters=True)
    # A real refusal by the database: this connection may only read.
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only = ON"))
    refused = KeyStore(engine)
    with pytest.raises(KeyStoreUnavailable) as caught:
        refused.put_many([_key(1)])
    assert "key-00001" not in str(caught.value)
    with pytest.raises(KeyStoreUnavailable):
        refused.destroy(["key-00001"])
    refused.close()
    assert store.get_many(["key-00001"]) == {}


def test_a_wrapped_key_is_not_shown() -> None:
    assert "wrapped" not in repr(_key(1))
