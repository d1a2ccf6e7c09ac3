"""The Merkle tree: known roots, and every small tree with every proof and every flipped bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import pytest

from audit.canonical import leaf_hash
from audit.merkle import (
    EMPTY_ROOT,
    Frontier,
    FrontierCorrupt,
    MerkleError,
    OutOfRange,
    ProofError,
    ProofShape,
    RootMismatch,
    check_consistency,
    check_inclusion,
    consistency_proof,
    inclusion_proof,
    node_hash,
    root_of,
    tree_root,
)

LARGEST = 64
LEAVES = [leaf_hash(bytes([number])) for number in range(LARGEST)]
ROOTS = [root_of(LEAVES[:size]) for size in range(LARGEST + 1)]
_NODES = {
    (level, index): root_of(LEAVES[index << level : (index + 1) << level])
    for level in range(7)
    for index in range(LARGEST >> level)
}

# The eight inputs of the certificate-transparency reference tests and the root after each of them.
CT_INPUTS = [
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
]  # fmt: skip
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
CT_LEAVES = [leaf_hash(bytes.fromhex(text)) for text in CT_INPUTS]


def _read(level: int, index: int) -> bytes:
    return _NODES[level, index]


def _within(size: int) -> Callable[[int, int], bytes]:
    """Return a reader that, like tiles, has only subtrees complete at `size`."""

    def read(level: int, index: int) -> bytes:
        assert (index + 1) << level <= size
        return _NODES[level, index]

    return read


def _flipped(proof: Sequence[bytes]) -> list[list[bytes]]:
    """Return the proof once for each of its bits, that bit flipped."""
    variants = []
    for position, value in enumerate(proof):
        number = int.from_bytes(value, "big")
        for bit in range(256):
            variants.append([*proof[:position], (number ^ (1 << bit)).to_bytes(32, "big"), *proof[position + 1 :]])
    return variants


def test_the_eight_reference_leaves_give_the_known_roots() -> None:
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    frontier = Frontier()
    for leaf, root in zip(CT_LEAVES, CT_ROOTS, strict=True):
        frontier.push(leaf)
        assert frontier.root().hex() == root
        assert root_of(CT_LEAVES[: frontier.size]).hex() == root


def test_the_reference_tree_has_the_known_proofs() -> None:
    def read(level: int, index: int) -> bytes:
        return root_of(CT_LEAVES[index << level : (index + 1) << level])

    pair = node_hash(CT_LEAVES[0], CT_LEAVES[1])
    assert [h.hex() for h in inclusion_proof(5, 8, read)] == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    assert inclusion_proof(2, 3, read) == [pair]
    assert [h.hex() for h in consistency_proof(2, 5, read)] == [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ]
    assert consistency_proof(4, 8, read) == [root_of(CT_LEAVES[4:8])]


def test_the_frontier_has_the_root_of_every_small_tree() -> None:
    frontier = Frontier()
    for size in range(LARGEST + 1):
        assert frontier.size == size
        assert frontier.root() == ROOTS[size] == tree_root(size, _within(size))
        assert Frontier.from_bytes(frontier.to_bytes()) == frontier
        if size < LARGEST:
            frontier.push(LEAVES[size])


def test_a_copied_frontier_grows_alone() -> None:
    frontier = Frontier.of(LEAVES[:5])
    copy = frontier.copy()
    copy.push(LEAVES[5])
    assert (frontier.root(), copy.root()) == (ROOTS[5], ROOTS[6])


def test_stored_bytes_that_are_no_frontier_are_refused() -> None:
    stored = Frontier.of(LEAVES[:7]).to_bytes()
    bad = [
        b"",
        b"\0" * 7,
        stored[:-1],
        stored + b"\0",
        stored + bytes(32),
        b"\0" * 8 + bytes(32),
        b"\xff" * (8 + 64 * 32),
    ]
    for wrong in bad:
        with pytest.raises(FrontierCorrupt):
            Frontier.from_bytes(wrong)


def test_a_frontier_takes_hashes_only() -> None:
    for wrong in (b"", LEAVES[0][:31], LEAVES[0] + b"\0"):
        with pytest.raises(ProofShape):
            Frontier().push(wrong)


def test_every_inclusion_proof_of_every_small_tree_holds() -> None:
    for size in range(1, LARGEST + 1):
        for index in range(size):
            check_inclusion(LEAVES[index], index, size, inclusion_proof(index, size, _within(size)), ROOTS[size])


def test_every_consistency_proof_of_every_small_tree_holds() -> None:
    for new in range(1, LARGEST + 1):
        for old in range(1, new + 1):
            check_consistency(old, ROOTS[old], new, ROOTS[new], consistency_proof(old, new, _within(new)))


def test_no_flipped_bit_of_any_inclusion_proof_goes_unseen() -> None:
    accepted = 0
    for size in range(1, LARGEST + 1):
        for index in range(size):
            for proof in _flipped(inclusion_proof(index, size, _read)):
                try:
                    check_inclusion(LEAVES[index], index, size, proof, ROOTS[size])
                    accepted += 1
                except RootMismatch:
                    pass
    assert accepted == 0


def test_no_flipped_bit_of_any_consistency_proof_goes_unseen() -> None:
    accepted = 0
    for new in range(1, LARGEST + 1):
        for old in range(1, new):
            for proof in _flipped(consistency_proof(old, new, _read)):
                try:
                    check_consistency(old, ROOTS[old], new, ROOTS[new], proof)
                    accepted += 1
                except RootMismatch:
                    pass
    assert accepted == 0


def test_no_proof_holds_for_another_leaf_index_size_or_root() -> None:
    for size in range(1, 20):
        for index in range(size):
            proof = inclusion_proof(index, size, _read)
            for other_size in range(1, 20):
                for other in range(other_size):
                    if (other, other_size) != (index, size) and ROOTS[other_size] != ROOTS[size]:
                        with pytest.raises(ProofError):
                            check_inclusion(LEAVES[index], other, other_size, proof, ROOTS[other_size])
            with pytest.raises(RootMismatch):
                check_inclusion(LEAVES[index + 1], index, size, proof, ROOTS[size])
            with pytest.raises(RootMismatch):
                check_inclusion(LEAVES[index], index, size, proof, ROOTS[size + 1])


def test_no_consistency_proof_holds_for_other_sizes_or_roots() -> None:
    for new in range(2, 20):
        for old in range(1, new):
            proof = consistency_proof(old, new, _read)
            with pytest.raises(RootMismatch):
                check_consistency(old, ROOTS[old + 20], new, ROOTS[new], proof)
            with pytest.raises(RootMismatch):
                check_consistency(old, ROOTS[old], new, ROOTS[new + 1], proof)
            for other in range(1, new + 1):
                if other != old:
                    with pytest.raises(ProofError):
                        check_consistency(other, ROOTS[other], new, ROOTS[new], proof)


def test_a_proof_with_a_hash_too_few_too_many_or_swapped_is_refused() -> None:
    for size in range(2, LARGEST + 1):
        for index in range(size):
            proof = inclusion_proof(index, size, _read)
            for wrong in (proof[:-1], proof[1:], [*proof, proof[-1]], [*proof, EMPTY_ROOT]):
                with pytest.raises(ProofError):
                    check_inclusion(LEAVES[index], index, size, wrong, ROOTS[size])
            if len(proof) > 1:
                with pytest.raises(RootMismatch):
                    check_inclusion(LEAVES[index], index, size, [proof[1], proof[0], *proof[2:]], ROOTS[size])


def test_a_hash_of_another_length_is_refused_before_it_is_hashed() -> None:
    proof = inclusion_proof(3, 7, _read)
    # 31 and 33 bytes side by side would make the same 64 bytes as two whole hashes.
    moved = [proof[0] + proof[1][:1], proof[1][1:], *proof[2:]]
    for wrong in (moved, [b"", *proof[1:]], [proof[0] * 2, *proof[1:]]):
        with pytest.raises(ProofShape):
            check_inclusion(LEAVES[3], 3, 7, wrong, ROOTS[7])
        with pytest.raises(ProofShape):
            check_consistency(3, ROOTS[3], 7, ROOTS[7], wrong)
    for leaf, root in ((LEAVES[3][:31], ROOTS[7]), (LEAVES[3], ROOTS[7] + b"\0"), (b"", ROOTS[7])):
        with pytest.raises(ProofShape):
            check_inclusion(leaf, 3, 7, proof, root)
    with pytest.raises(ProofShape):
        check_consistency(3, ROOTS[3][:8], 7, ROOTS[7], consistency_proof(3, 7, _read))


@pytest.mark.parametrize(("old", "new"), [(0, 0), (0, 7), (-1, 7), (8, 7), (1, 2**63), (-1, -1)])
def test_a_consistency_proof_from_nothing_or_backwards_is_refused(old: int, new: int) -> None:
    with pytest.raises(OutOfRange):
        consistency_proof(old, new, _read)
    for proof in ([], [ROOTS[7]]):
        with pytest.raises(OutOfRange):
            check_consistency(old, EMPTY_ROOT, new, ROOTS[7], proof)


@pytest.mark.parametrize(("index", "size"), [(0, 0), (7, 7), (-1, 7), (8, 7), (0, 2**63), (0, -1)])
def test_an_index_outside_the_tree_is_refused(index: int, size: int) -> None:
    with pytest.raises(OutOfRange):
        inclusion_proof(index, size, _read)
    with pytest.raises(OutOfRange):
        check_inclusion(LEAVES[0], index, size, [], LEAVES[0])


def test_two_trees_of_one_size_are_consistent_only_if_they_are_one() -> None:
    check_consistency(7, ROOTS[7], 7, ROOTS[7], [])
    with pytest.raises(RootMismatch):
        check_consistency(7, ROOTS[7], 7, ROOTS[8], [])
    with pytest.raises(ProofShape):
        check_consistency(7, ROOTS[7], 7, ROOTS[7], [ROOTS[7]])


def test_a_rewritten_leaf_breaks_consistency_with_the_old_root() -> None:
    forged = [*LEAVES[:2], hashlib.sha256(b"forged").digest(), *LEAVES[3:9]]

    def read(level: int, index: int) -> bytes:
        return root_of(forged[index << level : (index + 1) << level])

    for old in range(3, 9):
        with pytest.raises(RootMismatch):
            check_consistency(old, ROOTS[old], 9, root_of(forged), consistency_proof(old, 9, read))


def test_a_reader_that_gives_no_hash_is_an_error_not_a_proof() -> None:
    with pytest.raises(MerkleError):
        inclusion_proof(0, 2, lambda level, index: b"")
