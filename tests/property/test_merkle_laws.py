"""Laws of the Merkle tree at sizes the exhaustive test does not reach."""

from __future__ import annotations

import hashlib
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from audit.merkle import (
    EMPTY_ROOT,
    Frontier,
    check_consistency,
    check_inclusion,
    consistency_proof,
    inclusion_proof,
    node_hash,
    tree_root,
)

_sizes = st.integers(1, 2**40)


@cache
def _node(level: int) -> bytes:
    """Return the root of a complete subtree of a log whose leaves are all equal: any size is at hand at once."""
    return hashlib.sha256(b"\0leaf").digest() if level == 0 else node_hash(_node(level - 1), _node(level - 1))


def _read(level: int, index: int) -> bytes:
    return _node(level)


@given(_sizes, st.data())
def test_inclusion_holds_in_trees_of_any_size(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    check_inclusion(_node(0), index, size, inclusion_proof(index, size, _read), tree_root(size, _read))


@given(_sizes, st.data())
def test_consistency_holds_between_trees_of_any_size(new: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, new))
    proof = consistency_proof(old, new, _read)
    check_consistency(old, tree_root(old, _read), new, tree_root(new, _read), proof)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=300), st.integers(0, 300))
def test_a_frontier_stored_and_read_back_goes_on_to_the_same_root(leaves: list[bytes], pause: int) -> None:
    frontier = Frontier.from_bytes(Frontier.of(leaves[:pause]).to_bytes())
    for leaf in leaves[pause:]:
        frontier.push(leaf)
    assert frontier.root() == Frontier.of(leaves).root()
    assert (frontier.root() == EMPTY_ROOT) == (not leaves)
