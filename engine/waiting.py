"""The waiting queue: whose turn it is. Fair between keys, first come first served within one.

Every key has a count of the tokens that were computed for it; the key with the lowest count is next, the one that waits
longest among equals. So a key that asks for much waits for itself, and one that asks for little is served at once. A
key that comes, or comes back, begins at the lowest count there is: a pause earns nothing. What was preempted goes
before all others, oldest first: it had its turn.

Counts are kept of keys that have sequences in flight, so they are bounded by these. Knows no blocks and no steps.

Source: Sheng et al., OSDI 2024 (virtual token counter).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from engine.sequence import Sequence


class WaitingQueue:
    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()  # oldest first
        self._by_key: dict[str, deque[Sequence]] = {}  # keys that wait, each oldest first, none empty
        self._counts: dict[str, int] = {}  # tokens, of keys in flight
        self._in_flight: dict[str, int] = {}  # sequences, waiting or running

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._by_key.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """Yield what was preempted, then each key's, in no order of keys."""
        yield from self._preempted
        for waiting in self._by_key.values():
            yield from waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; from now on its key is in flight, until `leave`."""
        key = sequence.request.fairness_key
        if key not in self._counts:
            self._counts[key] = min(self._counts.values(), default=0)
            self._in_flight[key] = 0
        self._in_flight[key] += 1
        self._by_key.setdefault(key, deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that was preempted: before all others, and before those preempted before it."""
        self._preempted.appendleft(sequence)

    def next(self) -> Sequence:
        """Return whose turn it is; there must be one."""
        if self._preempted:
            return self._preempted[0]
        waiting = min(self._by_key.values(), key=lambda queue: (self._count(queue[0]), queue[0].arrival))
        return waiting[0]

    def pop(self, sequence: Sequence) -> None:
        """Take out a sequence that waits, wherever it stands."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        key = sequence.request.fairness_key
        self._by_key[key].remove(sequence)
        if not self._by_key[key]:
            del self._by_key[key]

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Note that tokens were computed for a sequence in flight."""
        self._counts[sequence.request.fairness_key] += tokens

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence is in flight no more; it does not wait."""
        key = sequence.request.fairness_key
        self._in_flight[key] -= 1
        if not self._in_flight[key]:
            del self._in_flight[key], self._counts[key]

    def _count(self, sequence: Sequence) -> int:
        return self._counts[sequence.request.fairness_key]
