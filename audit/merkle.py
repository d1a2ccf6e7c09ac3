"""The Merkle tree: hashes, roots, proofs and their checks. Pure; it asks a reader for the nodes it needs.

A node is named (level, index) and covers leaves index·2**level … (index + 1)·2**level − 1; level 0 are leaf hashes.
Only complete subtrees are ever read, so a reader can serve them from tiles that never change. A tree of 7 leaves:

                 root
               ╱      ╲
          (2,0)        k           frontier of size 7 = [(2,0), (1,2), (0,6)]: one complete subtree per set bit
         ╱    ╲      ╱   ╲         inclusion proof of leaf 4 = [(0,5), (0,6), (2,0)], lowest first
      (1,0) (1,1) (1,2) (0,6)      consistency proof 3 → 7 = [(0,2), (0,3), (1,0), k]
      ╱ ╲   ╱ ╲   ╱ ╲
      0 1   2 3   4 5   6

A proof is checked with everything it needs given; a `check_…` that returns has proved its statement.
Source: RFC 6962 section 2.1; RFC 9162 sections 2.1.1 to 2.1.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# MerkleError             catch this
# ├── OutOfRange          an index or size that no such tree has: the caller is wrong
# ├── FrontierCorrupt     stored frontier bytes are not a frontier
# └── ProofError          a proof does not prove what it is for
#     ├── ProofShape      wrong number of hashes, or a hash that is not 32 bytes
#     └── RootMismatch    the proof leads to another root


class MerkleError(ValueError):
    """The Merkle tree refuses."""


class OutOfRange(MerkleError):
    """No tree has this index or size."""


class FrontierCorrupt(MerkleError):
    """Stored frontier bytes are not a frontier."""


class ProofError(MerkleError):
    """A proof does not prove what it is for."""


class ProofShape(ProofError):
    """The proof has the wrong number of hashes, or one of them is not 32 bytes."""


class RootMismatch(ProofError):
    """The proof leads to another root."""


HASH_BYTES = 32
MAX_TREE_SIZE = 2**63 - 1  # leaves; what a signed 64-bit column holds
EMPTY_ROOT = hashlib.sha256(b"").digest()

# (level, index) → hash of that complete subtree.
NodeReader = Callable[[int, int], bytes]


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 ‖ left ‖ right), 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(leaf_hashes: Sequence[bytes]) -> bytes:
    """Return the root of the tree over `leaf_hashes`: the definition, word for word, and the oracle of the rest.

    Cost: one hash per leaf and O(n log n) copying; use a Frontier for long logs.
    """
    if not leaf_hashes:
        return EMPTY_ROOT
    if len(leaf_hashes) == 1:
        return leaf_hashes[0]
    split = _split(len(leaf_hashes))
    return node_hash(root_of(leaf_hashes[:split]), root_of(leaf_hashes[split:]))


@dataclass(slots=True)
class Frontier:
    """The right edge of a growing tree: its size and one hash per set bit of the size, largest subtree first.

    Stored as 8 bytes of size, big-endian, then the hashes: size 3 is `0000000000000003 ‖ (1,0) ‖ (0,2)`, 72 bytes.
    """

    size: int = 0  # leaves, 0 … 2**63 − 1
    hashes: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, leaf_hashes: Iterable[bytes]) -> Frontier:
        frontier = cls()
        for leaf in leaf_hashes:
            frontier.push(leaf)
        return frontier

    def push(self, leaf_hash: bytes) -> None:
        """Append one leaf hash. Cost: two hashes on average, 63 at most."""
        _check_hash(leaf_hash)
        if self.size >= MAX_TREE_SIZE:
            raise OutOfRange("the tree is full")
        carry, merges = leaf_hash, self.size
        while merges & 1:  # two complete subtrees of one size make the next
            carry = node_hash(self.hashes.pop(), carry)
            merges >>= 1
        self.hashes.append(carry)
        self.size += 1

    def root(self) -> bytes:
        """Return the root of the tree so far, 32 bytes."""
        if not self.hashes:
            return EMPTY_ROOT
        root = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            root = node_hash(left, root)
        return root

    def copy(self) -> Frontier:
        return Frontier(self.size, list(self.hashes))

    def to_bytes(self) -> bytes:
        return self.size.to_bytes(8, "big") + b"".join(self.hashes)

    @classmethod
    def from_bytes(cls, stored: bytes) -> Frontier:
        """Parse what `to_bytes` wrote.

        Raises:
            FrontierCorrupt: the number of hashes is not the number of set bits of the size.
        """
        size = int.from_bytes(stored[:8], "big")
        if len(stored) != 8 + HASH_BYTES * size.bit_count() or size > MAX_TREE_SIZE:
            raise FrontierCorrupt("the stored frontier does not fit its size; rebuild it from the leaves")
        return cls(size, [stored[at : at + HASH_BYTES] for at in range(8, len(stored), HASH_BYTES)])


def tree_root(size: int, read: NodeReader) -> bytes:
    """Return the root of the first `size` leaves. Cost: one read per set bit of `size`."""
    _check_size(size)
    return _range_root(0, size, read) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, read: NodeReader) -> list[bytes]:
    """Return the proof that leaf `index` stands in the tree of `size` leaves, lowest hash first.

    Raises:
        OutOfRange: not 0 ≤ index < size.
    """
    _check_index(index, size)
    proof: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        split = low + _split(high - low)
        if index < split:
            proof.append(_range_root(split, high, read))
            high = split
        else:
            proof.append(_range_root(low, split, read))
            low = split
    return proof[::-1]


def consistency_proof(old: int, new: int, read: NodeReader) -> list[bytes]:
    """Return the proof that the tree of `old` leaves is a prefix of the tree of `new` leaves; empty if old = new.

    Raises:
        OutOfRange: not 1 ≤ old ≤ new. Every tree extends the empty one: there is nothing to prove.
    """
    _check_sizes(old, new)
    proof: list[bytes] = []
    low, high, whole = 0, new, True  # whole: the old tree's part here is the old tree itself, whose root is known
    while high != old:
        split = low + _split(high - low)
        if old <= split:
            proof.append(_range_root(split, high, read))
            high = split
        else:
            proof.append(_range_root(low, split, read))
            low, whole = split, False
    if not whole:
        proof.append(_range_root(low, high, read))
    return proof[::-1]


def check_inclusion(leaf_hash: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Prove that `leaf_hash` is leaf `index` of the tree of `size` leaves with this `root`.

    Raises:
        OutOfRange: not 0 ≤ index < size.
        ProofShape: the proof has the wrong number of hashes, or a hash is not 32 bytes.
        RootMismatch: it is not so.
    """
    _check_index(index, size)
    _check_hashes(leaf_hash, root, *proof)
    remaining = list(reversed(proof))
    node, last = index, size - 1
    computed = leaf_hash
    while last:
        # A rightmost node without a sibling moves up unchanged and uses no hash.
        if node & 1 or node != last:
            sibling = _take(remaining)
            computed = node_hash(sibling, computed) if node & 1 else node_hash(computed, sibling)
        node, last = node >> 1, last >> 1
    _check_used(remaining)
    if computed != root:
        raise RootMismatch("the inclusion proof leads to another root")


def check_consistency(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Prove that the tree (old, old_root) is a prefix of the tree (new, new_root).

    Raises:
        OutOfRange: not 1 ≤ old ≤ new. A proof from the empty tree would prove nothing, and is refused.
        ProofShape: the proof has the wrong number of hashes, or a hash is not 32 bytes.
        RootMismatch: it is not so.
    """
    _check_sizes(old, new)
    _check_hashes(old_root, new_root, *proof)
    remaining = list(reversed(proof))
    if old == new:
        _check_used(remaining)
        if old_root != new_root:
            raise RootMismatch("two trees of one size have different roots")
        return
    node, last = old - 1, new - 1
    while node & 1:  # climb to the largest complete subtree that ends the old tree
        node, last = node >> 1, last >> 1
    # Where that subtree is the whole old tree, its hash is the old root and the proof leaves it out.
    old_computed = new_computed = _take(remaining) if node else old_root
    while last:
        if node & 1:
            left = _take(remaining)
            old_computed, new_computed = node_hash(left, old_computed), node_hash(left, new_computed)
        elif node != last:
            new_computed = node_hash(new_computed, _take(remaining))
        node, last = node >> 1, last >> 1
    _check_used(remaining)
    if old_computed != old_root:
        raise RootMismatch("the consistency proof leads to another old root")
    if new_computed != new_root:
        raise RootMismatch("the consistency proof leads to another new root")


def _range_root(low: int, high: int, read: NodeReader) -> bytes:
    """Return the root over leaves low … high − 1, where low is a multiple of the largest power of two it holds."""
    parts: list[bytes] = []
    while low < high:
        level = (high - low).bit_length() - 1
        parts.append(_read(read, level, low >> level))
        low += 1 << level
    root = parts[-1]
    for left in reversed(parts[:-1]):
        root = node_hash(left, root)
    return root


def _read(read: NodeReader, level: int, index: int) -> bytes:
    node = read(level, index)
    _check_hash(node)
    return node


def _split(size: int) -> int:
    """Return the largest power of two smaller than `size` (size ≥ 2)."""
    return 1 << ((size - 1).bit_length() - 1)


def _take(remaining: list[bytes]) -> bytes:
    """Return the proof's next hash; `remaining` is the proof backwards."""
    if not remaining:
        raise ProofShape("the proof has too few hashes")
    return remaining.pop()


def _check_used(remaining: Sequence[bytes]) -> None:
    if remaining:
        raise ProofShape("the proof has too many hashes")


def _check_hash(value: bytes) -> None:
    if len(value) != HASH_BYTES:
        raise ProofShape(f"a hash has {len(value)} bytes instead of {HASH_BYTES}")


def _check_hashes(*values: bytes) -> None:
    for value in values:
        if len(value) != HASH_BYTES:
            _check_hash(value)


def _check_size(size: int) -> None:
    if not 0 <= size <= MAX_TREE_SIZE:
        raise OutOfRange(f"no tree has {size} leaves")


def _check_index(index: int, size: int) -> None:
    _check_size(size)
    if not 0 <= index < size:
        raise OutOfRange(f"a tree of {size} leaves has no leaf {index}")


def _check_sizes(old: int, new: int) -> None:
    _check_size(new)
    if not 1 <= old <= new:
        raise OutOfRange(f"a tree of {new} leaves has no consistency proof from {old} leaves")
