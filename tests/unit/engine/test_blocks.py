from __future__ import annotations

import hashlib
import struct

import pytest

from engine.blocks import BlockPool, BlocksExhausted, BlocksMisused, Defect, chain_key, root_key


def key(number: int) -> bytes:
    return chain_key(root_key(b"tenant-a"), [number] * 16)


def cached_pool(total: int, count: int) -> tuple[BlockPool, list[int]]:
    """A pool in which the table of one finished sequence of `count` blocks is cached."""
    pool = BlockPool(total)
    table = pool.allocate(count)
    for number, block in enumerate(table):
        pool.publish(block, key(number))
    pool.release(table)
    return pool, table


def defects(pool: BlockPool, *tables: list[int]) -> set[Defect]:
    return {finding.defect for finding in pool.check_integrity(tables)}


def test_the_example_key_of_the_format_is_the_documented_one() -> None:
    assert chain_key(root_key(b"tenant-a"), range(16)).hex() == (
        "1316eb74aaf171bd01e041e730702331b65d42dbc565cf629f30c8cd5d7e6543"
    )


def test_a_key_is_the_chain_its_format_describes() -> None:
    root = hashlib.sha256(b"probity/kv-root/1" + b"salt").digest()
    tokens = [0, 1, 2**32 - 1, *range(13)]
    assert chain_key(root_key(b"salt"), tokens) == hashlib.sha256(root + struct.pack("<16I", *tokens)).digest()


def test_keys_differ_by_salt_by_token_and_by_what_came_before() -> None:
    tokens = list(range(16))
    first = chain_key(root_key(b"a"), tokens)
    others = [
        chain_key(root_key(b"b"), tokens),
        chain_key(root_key(b"a"), [*tokens[:15], 99]),
        chain_key(first, tokens),
    ]
    assert len({first, *others}) == 4


def test_the_root_of_an_adapter_is_the_one_its_format_describes_and_no_salt_s() -> None:
    name = hashlib.sha256("Maß".encode()).digest()
    root = hashlib.sha256(b"probity/kv-adapter-root/1" + name + b"salt").digest()
    assert root_key(b"salt", "Maß") == root
    roots = {root_key(salt, name) for salt in (b"", b"a", b"aa") for name in (None, "", "a", "aa")}
    assert len(roots) == 12


def test_a_key_needs_exactly_one_block_of_tokens() -> None:
    with pytest.raises(struct.error):
        chain_key(root_key(b"a"), range(15))


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="total"):
        BlockPool(0)


def test_allocated_blocks_are_used_and_distinct_until_released() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.free, pool.cached, pool.used) == (0, 0, 5)
    pool.release(first)
    assert (pool.free, pool.cached, pool.used) == (2, 0, 3)
    assert defects(pool, second) == set()


def test_asking_for_more_than_available_takes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(BlocksExhausted):
        pool.allocate(3)
    assert (pool.free, pool.used) == (2, 1)


def test_a_published_block_stays_findable_after_its_holder_left() -> None:
    pool, table = cached_pool(4, 2)
    assert (pool.free, pool.cached, pool.used) == (2, 2, 0)
    assert [pool.find(key(0)), pool.find(key(1)), pool.find(key(2))] == [*table, None]
    assert defects(pool) == set()


def test_sharing_counts_every_holder() -> None:
    pool, table = cached_pool(4, 2)
    pool.share(table)
    pool.share(table[:1])
    assert (pool.free, pool.cached, pool.used) == (2, 0, 2)
    assert defects(pool, table, table[:1]) == set()
    pool.release(table)
    assert (pool.cached, pool.used) == (1, 1)
    pool.release(table[:1])
    assert (pool.cached, pool.used) == (2, 0)


def test_eviction_takes_free_blocks_first_then_the_far_end_of_the_oldest_prefix() -> None:
    pool, table = cached_pool(4, 3)
    assert pool.allocate(1) == [3]
    assert pool.allocate(1) == [table[2]]
    assert pool.find(key(2)) is None
    assert pool.find(key(1)) == table[1]


def test_a_prefix_used_again_is_evicted_after_one_that_was_not() -> None:
    pool, old = cached_pool(2, 1)
    (newer,) = pool.allocate(1)
    pool.publish(newer, key(7))
    pool.release([newer])
    pool.share(old)
    pool.release(old)
    assert pool.allocate(1) == [newer]
    assert pool.find(key(0)) == old[0]


def test_an_evicted_block_forgets_its_key_and_can_carry_another() -> None:
    pool, table = cached_pool(1, 1)
    assert pool.allocate(1) == table
    pool.publish(table[0], key(9))
    assert pool.find(key(0)) is None
    assert pool.find(key(9)) == table[0]
    assert defects(pool, table) == set()


def test_the_second_block_of_equal_contents_stays_private() -> None:
    pool = BlockPool(2)
    one, two = pool.allocate(1), pool.allocate(1)
    pool.publish(one[0], key(0))
    pool.publish(two[0], key(0))
    pool.release(two)
    assert pool.find(key(0)) == one[0]
    assert (pool.free, pool.cached, pool.used) == (1, 0, 1)
    assert defects(pool, one) == set()


def test_releasing_sharing_or_publishing_what_nobody_holds_is_our_error() -> None:
    pool = BlockPool(2)
    for misuse in (lambda: pool.release([0]), lambda: pool.share([0]), lambda: pool.publish(0, key(0))):
        with pytest.raises(BlocksMisused, match="block 0"):
            misuse()
    assert defects(pool) == set()


def test_integrity_names_a_leaked_and_a_twice_held_block() -> None:
    pool = BlockPool(4)
    table = pool.allocate(2)
    assert defects(pool) == {Defect.REFERENCES}
    assert defects(pool, table, table) == {Defect.REFERENCES}
    assert defects(pool, [*table, 17]) == {Defect.RANGE}


def test_integrity_names_every_kind_of_damage() -> None:
    pool, table = cached_pool(4, 1)
    pool._free.append(table[0])  # damage on purpose: nothing in the interface can cause it
    assert {Defect.COUNT, Defect.OVERLAP, Defect.KEY} <= defects(pool)

    pool, table = cached_pool(4, 1)
    pool._key_of[table[0]] = None
    assert {Defect.ORPHAN, Defect.KEY} <= defects(pool)

    pool, table = cached_pool(4, 1)
    pool._block_of.clear()
    assert defects(pool) == {Defect.KEY}

    pool = BlockPool(4)
    pool._free.pop()
    assert defects(pool) == {Defect.COUNT}


def cache(pool: BlockPool, owner: bytes, numbers: range) -> list[int]:
    """Let `owner` cache a block under each of `numbers`."""
    blocks = pool.allocate(len(numbers), owner)
    for block, number in zip(blocks, numbers, strict=True):
        pool.publish(block, key(number), owner)
    pool.release(blocks)
    return blocks


def test_a_flood_of_one_owner_evicts_its_own_and_leaves_the_others_their_share() -> None:
    pool = BlockPool(12)
    quiet = cache(pool, b"quiet", range(4))
    for start in range(100, 200, 4):
        cache(pool, b"flood", range(start, start + 4))
    assert [pool.find(key(number)) for number in range(4)] == quiet
    cache(pool, b"quiet", range(10, 18))  # who is under its share takes the oldest of all
    assert all(pool.find(key(number)) is not None for number in range(10, 18))
    assert pool.check_integrity([]) == ()


def test_what_an_owner_cached_can_be_forgotten_also_while_it_is_held() -> None:
    pool = BlockPool(6)
    cache(pool, b"other", range(2))
    cached = cache(pool, b"gone", range(10, 12))
    held = pool.allocate(1, b"gone")
    pool.publish(held[0], key(12), b"gone")
    assert pool.forget(b"gone") == 3
    assert all(pool.find(key(number)) is None for number in range(10, 13))
    assert all(pool.find(key(number)) is not None for number in range(2))
    assert (pool.free, pool.cached, pool.used) == (3, 2, 1)
    pool.release(held)
    assert pool.free == 4
    assert pool.check_integrity([]) == ()
    assert pool.is_idle(cached[0])
