"""Data keys on stock: made, wrapped and durable before a record asks for one.

A record's key must be durable before the record is. One by one that is a commit more for every request; so keys are
stored by the handful, the more of them the faster a tenant uses them, and most requests find theirs ready.

    take ─▶ from the shelf of the tenant, or made now ─▶ store ─▶ the record's transaction

A key is given out once, also where the record it was for is refused. What is left when the writer ends is destroyed;
what a crash leaves is a key that nothing was ever encrypted with. For one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from audit.content import DATA_KEY_BYTES, Random
from audit.keys import KeyEncryption
from audit.keystore import KeyStore, WrappedKey

MAX_STORED_AT_ONCE = 64  # keys of one tenant
MAX_SHELVES = 1024  # tenants with keys on stock


@dataclass(frozen=True, slots=True)
class DataKey:
    id: str
    key: bytes = field(repr=False)


@dataclass(slots=True)
class _Shelf:
    """One tenant's keys, and how many are made the next time."""

    ready: list[DataKey] = field(default_factory=list)
    next_count: int = 1


class KeySupply:
    def __init__(
        self, keystore: KeyStore, encryption: KeyEncryption, random: Random, new_id: Callable[[], str]
    ) -> None:
        self._keystore = keystore
        self._encryption = encryption
        self._random = random
        self._new_id = new_id
        self._shelves: dict[str, _Shelf] = {}  # by tenant, those longest without a new key first
        self._unstored: list[WrappedKey] = []

    def take(self, tenant: str) -> DataKey:
        """Return a key that was never given out. Nothing that it encrypts may be committed before `store` returned."""
        shelf = self._shelves.get(tenant)
        if shelf is None or not shelf.ready:
            shelf = self._fill(tenant, shelf or _Shelf())
        return shelf.ready.pop()

    def _fill(self, tenant: str, shelf: _Shelf) -> _Shelf:
        for _ in range(shelf.next_count):
            key = DataKey(self._new_id(), self._random(DATA_KEY_BYTES))
            self._unstored.append(WrappedKey(key.id, tenant, self._encryption.wrap(tenant, key.key)))
            shelf.ready.append(key)
        shelf.next_count = min(2 * shelf.next_count, MAX_STORED_AT_ONCE)
        self._shelves.pop(tenant, None)
        self._shelves[tenant] = shelf
        if len(self._shelves) > MAX_SHELVES:
            del self._shelves[next(iter(self._shelves))]
        return shelf

    def store(self) -> None:
        """Make durable what was made since the last time.

        Raises:
            KeyStoreError: not confirmed. Every key of the tenants concerned is forgotten.
        """
        unstored, self._unstored = self._unstored, []
        try:
            self._keystore.put_many(unstored)
        except BaseException:
            for wrapped in unstored:
                self._shelves.pop(wrapped.tenant, None)
            raise

    def destroy_rest(self) -> None:
        """Destroy the keys that nobody took.

        Raises:
            KeyStoreError: not confirmed; they stay in the store, unused.
        """
        left = [key.id for shelf in self._shelves.values() for key in shelf.ready]
        self._shelves.clear()
        if left:
            self._keystore.destroy(left)
