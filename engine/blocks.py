"""BlockPool: which KV block belongs to whom, and which may be shared. Ids only; the tensors live with the runner.

A block is in exactly one of three states:
    free    nobody holds it, nothing worth keeping is in it
    cached  nobody holds it, but its contents can be found again by their key; evicted least recently used first, of
            whoever asks for room and has more than a share of the cache, else of all
    used    held by `references` ≥ 1 sequences; may carry a key as well

Only full blocks carry a key. The key of a block is a SHA-256 chain over everything before it, rooted in the cache
salt and the adapter: equal keys mean equal salt, equal weights, equal tokens at equal positions, hence (by the engine's
contract) equal bits. Blocks of one salt, or of one adapter, are unreachable from another because the root differs.

    root  = SHA-256("probity/kv-root/1" ‖ salt); with an adapter
            SHA-256("probity/kv-adapter-root/1" ‖ SHA-256(name of the adapter) ‖ salt)
    key_i = SHA-256(key_{i−1} ‖ 16 token ids, each u32 little-endian),  key_{−1} = root
    e.g. salt b"tenant-a", tokens 0 … 15:
         key_0 = 1316eb74…  (tests/unit/engine/test_blocks.py holds it whole)

Source: Kwon et al., SOSP 2023 (paged KV); the salted chain answers CVE-2025-46570 and PROMPTPEEK.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.plan import BLOCK_SIZE

_BLOCK_TOKENS = struct.Struct(f"<{BLOCK_SIZE}I")


class BlocksExhausted(Exception):
    """We are wrong: more blocks were asked for than `available`. The scheduler checks before it asks."""


class BlocksMisused(Exception):
    """We are wrong: a block was released or shared that nobody holds. The message names the block."""


class Defect(StrEnum):
    COUNT = "count"  # free + cached + used is not the total
    OVERLAP = "overlap"  # a block is in two states at once
    REFERENCES = "references"  # a block's references disagree with the tables handed in
    KEY = "key"  # the key index and the blocks' keys disagree
    ORPHAN = "orphan"  # a cached block without a key: it could never be found again
    RANGE = "range"  # a table names a block that does not exist
    TABLE = "table"  # a sequence holds fewer blocks than its computed tokens need, or the same block twice
    QUEUE = "queue"  # a sequence stands in the wrong queue for its status


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not add up. `subject` is a block id, or the arrival number of a sequence."""

    defect: Defect
    subject: int | None
    message: str


def root_key(salt: bytes, adapter: str | None = None) -> bytes:
    if adapter is None:
        return hashlib.sha256(b"probity/kv-root/1" + salt).digest()
    return hashlib.sha256(b"probity/kv-adapter-root/1" + hashlib.sha256(adapter.encode()).digest() + salt).digest()


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of the block holding `tokens` (exactly BLOCK_SIZE) after the block keyed `parent`."""
    return hashlib.sha256(parent + _BLOCK_TOKENS.pack(*tokens)).digest()


class BlockPool:
    """Bookkeeping of `total` blocks, ids 0 … total − 1. Every operation is O(blocks it is handed).

    Blocks are asked for and cached under an owner, the salt: who fills the cache beyond a share, of as many as there
    are owners in it, makes room from its own, and a flood of one leaves the others' prefixes where they are.
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError("`total` must be at least 1")
        self.total = total
        self._free: deque[int] = deque(range(total))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._cached_by: dict[bytes, OrderedDict[int, None]] = {}  # the same by owner, none empty
        self._owner_of: list[bytes] = [b""] * total  # of blocks with a key
        self._references = [0] * total
        self._key_of: list[bytes | None] = [None] * total
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Blocks `allocate` can hand out now: the free ones, then the cached ones."""
        return len(self._free) + len(self._cached)

    def is_idle(self, block: int) -> bool:
        """Return whether nobody holds `block`: sharing it takes one from `available`."""
        return self._references[block] == 0

    def allocate(self, count: int, owner: bytes = b"") -> list[int]:
        """Return `count` blocks of undefined contents, each held once. Evicts the oldest cached blocks if it must.

        Raises: BlocksExhausted; nothing was taken.
        """
        if count > self.available:
            raise BlocksExhausted(f"{count} blocks asked for, {self.available} available")
        blocks = [self._free.popleft() if self._free else self._evict(owner) for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def find(self, key: bytes) -> int | None:
        """Return the block that holds the contents of `key`, used or cached. It stays where it is."""
        return self._block_of.get(key)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold each of `blocks`, found by its key, once more."""
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._cached:
                    raise BlocksMisused(f"block {block} is free and cannot be shared")
                self._uncache(block)
            self._references[block] += 1

    def publish(self, block: int, key: bytes, owner: bytes = b"") -> None:
        """Make the full, written `block` findable by `key`, which is rooted in `owner`.

        Where another block already answers to `key` (two sequences computed the same at the same time), that one stays
        and this one remains private to its holder.
        """
        if self._references[block] == 0:
            raise BlocksMisused(f"block {block} is held by nobody and cannot be published")
        if key in self._block_of or self._key_of[block] is not None:
            return
        self._block_of[key] = block
        self._key_of[block] = key
        self._owner_of[block] = owner

    def forget(self, owner: bytes) -> int:
        """Let nothing that `owner` published be found again; return how many blocks that were.

        Cost: O(total).
        """
        found = [block for block in self._block_of.values() if self._owner_of[block] == owner]
        for block in found:
            if self._references[block] == 0:
                self._uncache(block)
                self._free.append(block)
            self._unpublish(block)
        return len(found)

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of each of `blocks`, a sequence's table in order, once.

        The end of the table is let go first, so that eviction, oldest first, shortens a cached prefix from its far end
        and never leaves blocks behind a hole where no lookup could reach them.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise BlocksMisused(f"block {block} is held by nobody and cannot be released")
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None
                self._cached_by.setdefault(self._owner_of[block], OrderedDict())[block] = None

    def _evict(self, owner: bytes) -> int:
        """Take the oldest cached block for `owner`: of its own, where it has more than its share of them."""
        own = self._cached_by.get(owner, OrderedDict())
        crowded = len(own) * len(self._cached_by) > len(self._cached)
        block = next(iter(own if crowded else self._cached))
        self._uncache(block)
        self._unpublish(block)
        return block

    def _uncache(self, block: int) -> None:
        del self._cached[block]
        owner = self._owner_of[block]
        del self._cached_by[owner][block]
        if not self._cached_by[owner]:
            del self._cached_by[owner]

    def _unpublish(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> tuple[Finding, ...]:
        """Return what does not add up; empty means sound. `tables` are those of every sequence holding blocks.

        Cost: O(total + length of the tables). Reports, changes nothing, never raises.
        """
        return (*self._check_states(), *self._check_keys(), *self._check_references(tables))

    def _check_states(self) -> Iterable[Finding]:
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._references) if count > 0}
        if len(self._free) + len(self._cached) + len(used) != self.total:
            counts = f"{len(self._free)} free + {len(self._cached)} cached + {len(used)} used"
            yield Finding(Defect.COUNT, None, f"{counts} are not {self.total} blocks")
        for block in sorted((free & cached) | (free & used) | (cached & used)):
            yield Finding(Defect.OVERLAP, block, f"block {block} is in two states at once")
        owned = [block for blocks in self._cached_by.values() for block in blocks]
        if len(owned) != len(cached) or set(owned) != cached:
            yield Finding(Defect.COUNT, None, "the blocks cached by owner are not the cached blocks")
        for block in sorted(cached):
            if self._key_of[block] is None:
                yield Finding(Defect.ORPHAN, block, f"block {block} is cached without a key")

    def _check_keys(self) -> Iterable[Finding]:
        for key, block in self._block_of.items():
            if self._key_of[block] != key:
                yield Finding(Defect.KEY, block, f"the index names block {block} by a key it does not carry")
        free = set(self._free)
        for block, own in enumerate(self._key_of):
            if own is None:
                continue
            if self._block_of.get(own) != block:
                yield Finding(Defect.KEY, block, f"block {block} carries a key the index does not name it by")
            if block in free:
                yield Finding(Defect.KEY, block, f"block {block} is free and carries a key")

    def _check_references(self, tables: Iterable[Sequence[int]]) -> Iterable[Finding]:
        held = Counter(block for table in tables for block in table)
        for block in sorted(block for block in held if not 0 <= block < self.total):
            yield Finding(Defect.RANGE, block, f"a table names block {block} of {self.total}")
        for block, references in enumerate(self._references):
            if references != held[block]:
                message = f"block {block} has {references} references, {held[block]} tables hold it"
                yield Finding(Defect.REFERENCES, block, message)
