"""Leaves are numbered densely, and the tiles and the head give the root of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine, insert, select

import migrations
from audit.merkle import Frontier, tree_root
from audit.sequencer import TILE_WIDTH, NewLeaf, node_reader, number, open_log
from audit.tables import head, leaf, leaf_number, tile

LOG = "probity.local/acme-bank"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path}/audit.db"
    migrations.upgrade(url)
    engine = create_engine(url)
    with engine.begin() as connection:
        open_log(connection, LOG, "acme-bank")
    yield engine
    engine.dispose()


def new_leaves(first: int, count: int) -> list[NewLeaf]:
    return [NewLeaf("w", seq, hashlib.sha256(b"%d" % seq).digest()) for seq in range(first, first + count)]


def append(connection: Connection, leaves: Sequence[NewLeaf]) -> None:
    rows = [
        {
            "log": LOG,
            "writer": new.writer,
            "writer_seq": new.writer_seq,
            "leaf_hash": new.leaf_hash,
            "bytes": b"",
            "record_id": str(new.writer_seq),
            "type": "audit.read",
            "time": 0,
        }
        for new in leaves
    ]
    connection.execute(insert(leaf), rows)
    number(connection, LOG, leaves)


def naive_root(leaves: Sequence[NewLeaf]) -> bytes:
    frontier = Frontier()
    for new in leaves:
        frontier.push(new.leaf_hash)
    return frontier.root()


@pytest.mark.parametrize("batches", [[1], [255], [256], [257], [255, 1, 1], [1, 511, 1], [100] * 6, [700, 324, 1]])
def test_the_root_read_from_tiles_is_that_of_all_leaves_at_every_size(engine: Engine, batches: list[int]) -> None:
    for batch in batches:
        with engine.begin() as connection:
            (size,) = connection.execute(select(head.c.size)).one()
            append(connection, new_leaves(size, batch))
    total = sum(batches)
    with engine.connect() as connection:
        read = node_reader(connection, LOG)
        for size in sorted({1, 2, 255, 256, 257, 512, 513, total - 1, total} & set(range(1, total + 1))):
            assert tree_root(size, read) == naive_root(new_leaves(0, size))
        stored = connection.execute(select(head.c.size, head.c.frontier)).one()
        assert (stored.size, Frontier.from_bytes(stored.frontier).root()) == (total, naive_root(new_leaves(0, total)))
        indexes = connection.execute(select(leaf_number.c.leaf_index).order_by(leaf_number.c.leaf_index)).scalars()
        assert list(indexes) == list(range(total))


def test_tiles_of_the_second_and_third_level_are_written_when_they_are_full(engine: Engine) -> None:
    total = TILE_WIDTH**2 + TILE_WIDTH + 3
    for first in range(0, total, 5_000):
        with engine.begin() as connection:
            append(connection, new_leaves(first, min(5_000, total - first)))
    with engine.connect() as connection:
        rows = connection.execute(select(tile.c.level, tile.c.tile_index, tile.c.hashes)).all()
        assert {(row.level, row.tile_index) for row in rows} == {(0, n) for n in range(TILE_WIDTH + 1)} | {(1, 0)}
        assert {len(row.hashes) for row in rows} == {TILE_WIDTH * 32}
        root_at = partial(tree_root, read=node_reader(connection, LOG))
        for size in (TILE_WIDTH**2 - 1, TILE_WIDTH**2, TILE_WIDTH**2 + 1, total):
            assert root_at(size) == naive_root(new_leaves(0, size))


def test_a_log_is_opened_once(engine: Engine) -> None:
    with engine.begin() as connection:
        append(connection, new_leaves(0, 3))
        open_log(connection, LOG, "acme-bank")
        assert connection.execute(select(head.c.size)).scalars().all() == [3]
