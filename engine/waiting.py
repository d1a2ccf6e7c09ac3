"""Turns: whose sequence runs next. Fair between keys; within one by priority, then first come first served.

A key's share of the places is as its weight among the keys in flight. Who waits with fewer than that is owed one and
goes first, and of these a key that asks for no more than its share; who has more may have to give one back
(scheduler.py). So a key that asks for much waits for itself, and one that asks for little is served at once.

Beyond that the key goes next for which the fewest tokens were computed, by weight. A key that comes, or comes back,
begins at the lowest count there is: a pause earns nothing.

Counts are kept of keys that have sequences in flight, so they are bounded by these. Knows no blocks and no steps.

Source: Sheng et al., OSDI 2024 (virtual token counter).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.sequence import Sequence


@dataclass(slots=True)
class _Key:
    """What is known of one key in flight."""

    weight: int
    count: float  # tokens computed, by weight
    waiting: list[Sequence] = field(default_factory=list)  # whose turn is first stands first
    in_flight: int = 0  # sequences, waiting or running

    @property
    def running(self) -> int:
        return self.in_flight - len(self.waiting)


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


class WaitingQueue:
    def __init__(self, places: int) -> None:
        """`places`: sequences that run at once."""
        self._places = places
        self._keys: dict[str, _Key] = {}  # in flight
        self._weight = 0  # of all of them

    def __len__(self) -> int:
        return sum(len(key.waiting) for key in self._keys.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Yield each key's in the order of their turns, in no order of keys."""
        for key in self._keys.values():
            yield from key.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; from now on its key is in flight, until `leave`."""
        name = sequence.request.fairness_key
        if name not in self._keys:
            lowest = min((key.count for key in self._keys.values()), default=0.0)
            self._keys[name] = _Key(sequence.request.weight, lowest)
            self._weight += sequence.request.weight
        key = self._keys[name]
        self._weight += sequence.request.weight - key.weight
        key.weight = sequence.request.weight
        key.in_flight += 1
        insort(key.waiting, sequence, key=_turn)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that was preempted: before all of its key that came later."""
        insort(self._key(sequence).waiting, sequence, key=_turn)

    def next(self) -> Sequence:
        """Return whose turn it is; there must be one."""
        waiting = [key for key in self._keys.values() if key.waiting]
        return min(waiting, key=self._order).waiting[0]

    def _order(self, key: _Key) -> tuple[bool, bool, float, int]:
        share = self._share(key)
        return key.running >= share, key.in_flight > share, key.count, key.waiting[0].arrival

    def pop(self, sequence: Sequence) -> None:
        """Take out a sequence that waits, wherever it stands."""
        self._key(sequence).waiting.remove(sequence)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Note that tokens were computed for a sequence in flight."""
        key = self._key(sequence)
        key.count += tokens / key.weight

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence is in flight no more; it does not wait."""
        key = self._key(sequence)
        key.in_flight -= 1
        if not key.in_flight:
            self._weight -= key.weight
            del self._keys[sequence.request.fairness_key]

    @property
    def running(self) -> int:
        """How many sequences in flight do not wait."""
        return sum(key.running for key in self._keys.values())

    def in_flight(self, name: str) -> int:
        """Return how many sequences of a key wait or run."""
        return self._keys[name].in_flight if name in self._keys else 0

    def is_owed(self, sequence: Sequence) -> bool:
        """Return whether the key of `sequence` has fewer places than its share."""
        key = self._key(sequence)
        return key.running < self._share(key)

    def is_above_share(self, sequence: Sequence) -> bool:
        """Return whether the key of `sequence` has more places than its share."""
        key = self._key(sequence)
        return key.running > self._share(key)

    def asks_above_share(self, sequence: Sequence) -> bool:
        """Return whether the key of `sequence` would have more places than its share if all it waits for ran."""
        key = self._key(sequence)
        return key.in_flight > self._share(key)

    def _share(self, key: _Key) -> int:
        return max(1, self._places * key.weight // self._weight)

    def excess(self, sequence: Sequence) -> float:
        """Return how many places the key of `sequence` has, by weight."""
        key = self._key(sequence)
        return key.running / key.weight

    def _key(self, sequence: Sequence) -> _Key:
        return self._keys[sequence.request.fairness_key]
