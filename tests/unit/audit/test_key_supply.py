"""Data keys on stock: durable before they may be used, and never given out twice."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from audit.key_supply import MAX_SHELVES, MAX_STORED_AT_ONCE, DataKey, KeySupply
from audit.keys import FileKeyEncryption
from audit.keystore import KeyNotHeld, KeyStore, KeyStoreUnavailable


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore.open(f"sqlite:///{tmp_path}/keys.db")
    yield store
    store.close()


ENCRYPTION = FileKeyEncryption(bytes(range(32)))


def supply_on(store: KeyStore) -> KeySupply:
    numbers = itertools.count()
    return KeySupply(store, ENCRYPTION, os.urandom, lambda: f"key-{next(numbers)}")


def stored(store: KeyStore, tenant: str, key: DataKey) -> bool:
    """Return whether the store holds this very key for the tenant."""
    try:
        return ENCRYPTION.unwrap(tenant, store.get(key.id).wrapped) == key.key
    except KeyNotHeld:
        return False


def test_a_key_is_durable_once_stored_and_no_two_are_alike(store: KeyStore) -> None:
    supply = supply_on(store)
    taken: list[tuple[str, DataKey]] = []
    for turn in range(300):
        tenant = f"tenant-{turn % 3}"
        taken.append((tenant, supply.take(tenant)))
        supply.store()
        assert stored(store, *taken[-1])
    assert len({key.id for _, key in taken}) == len({key.key for _, key in taken}) == 300


def test_a_busy_tenant_s_keys_are_stored_by_the_handful_and_a_quiet_one_s_singly(store: KeyStore) -> None:
    commits: list[object] = []
    event.listen(store._engine, "commit", commits.append)
    supply = supply_on(store)
    for _ in range(1000):
        supply.take("busy")
        supply.store()
    # 1, 2, 4 … 64, then 64 each: seven commits for the first 127.
    assert len(commits) == 7 + -(-(1000 - 127) // MAX_STORED_AT_ONCE)
    supply.take("quiet")
    supply.store()
    assert supply._shelves["quiet"].ready == []


def test_what_was_made_without_being_stored_is_stored_before_anything_is_committed(store: KeyStore) -> None:
    supply = supply_on(store)
    first = supply.take("t")  # its record was refused: nothing was committed, nothing stored
    second, third = supply.take("t"), supply.take("t")
    supply.store()
    assert [stored(store, "t", key) for key in (first, second, third)] == [True] * 3


def test_keys_that_the_store_did_not_confirm_are_never_given_out(store: KeyStore) -> None:
    supply = supply_on(store)
    for _ in range(4):
        supply.take("t")
    supply.store()
    refusing = True

    def refuse(*_: object) -> None:
        if refusing:
            raise OSError("no space")

    lost = [supply.take("t") for _ in range(4)]  # the last ones on the shelf, and the first of new ones
    event.listen(store._engine, "commit", refuse)
    with pytest.raises((KeyStoreUnavailable, OSError)):
        supply.store()
    refusing = False
    after = [supply.take("t") for _ in range(20)]
    supply.store()
    assert all(stored(store, "t", key) for key in after)
    assert not {key.id for key in after} & {key.id for key in lost}


def test_what_nobody_took_is_destroyed_and_what_was_taken_stays(store: KeyStore) -> None:
    supply = supply_on(store)
    taken = []
    for _ in range(5):
        taken.append(supply.take("t"))
        supply.store()
    left = list(supply._shelves["t"].ready)
    assert left
    supply.destroy_rest()
    assert all(stored(store, "t", key) for key in taken)
    assert not any(stored(store, "t", key) for key in left)


def test_only_so_many_tenants_have_keys_on_stock(store: KeyStore) -> None:
    supply = supply_on(store)
    for number in range(MAX_SHELVES + 10):
        supply.take(f"tenant-{number}")
    assert len(supply._shelves) == MAX_SHELVES
    assert "tenant-0" not in supply._shelves
    supply.store()


def test_a_key_is_not_shown() -> None:
    assert "00" * 4 not in repr(DataKey("id", bytes(32)))
    assert "\\x00" not in repr(DataKey("id", bytes(32)))
