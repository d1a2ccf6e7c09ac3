"""Attention by tiles: equal to the slow version, the same bits however it is asked, blind beyond a context."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels.shape import ShapeError
from tests.support.attention_world import PAGE, World
from tests.support.poison import among_nan

pytest.importorskip("numba")

from kernels import tile_attention as kernel
from kernels.tile_attention import (
    KEYS,
    Attention,
    as_tiles,
    from_tiles,
    takes,
    tile_attention_reference,
    verify_invariance,
)

heads_of_sizes = pytest.mark.parametrize(
    ("heads", "groups", "size"),
    [(4, 2, 16), (3, 1, 32), (7, 7, 48), (14, 2, 64), (10, 5, 80), (16, 1, 96), (2, 1, 128), (2, 2, 240), (2, 1, 256)],
)


class Tiled:
    """A world whose caches lie in tiles, between NaN."""

    def __init__(self, attention: Attention, lengths: list[int], heads: int, groups: int, size: int) -> None:
        self._attention = attention
        self.world = World(lengths, heads, groups, size)
        self.caches = tuple(among_nan(cache) for cache in as_tiles(*self.world.caches))

    def attend(self, *rows: tuple[int, int, int]) -> torch.Tensor:
        """Each row: a sequence, and the positions from … to of which attention is asked."""
        query, sequence, positions = self.world.asked(list(rows))
        scale = query.shape[-1] ** -0.5
        return self._attention(among_nan(query), *self.caches, self.world.table, sequence, positions, scale)


@pytest.fixture
def tile_attention(by_tiles: bool) -> Attention:
    return partial(kernel.tile_attention, tiles=by_tiles)


@pytest.fixture
def tiled_world(tile_attention: Attention) -> Callable[..., Tiled]:
    return partial(Tiled, tile_attention)


@heads_of_sizes
def test_attention_equals_the_reference_at_ugly_sizes(
    tiled_world: Callable[..., Tiled], heads: int, groups: int, size: int
) -> None:
    lengths = [1, 17, 63, 65, 130]
    tiled = tiled_world(lengths, heads, groups, size)
    out = tiled.attend(*((index, 0, length) for index, length in enumerate(lengths)))
    expected = torch.cat([tiled.world.reference(index) for index in range(len(lengths))])
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0.03)


def test_what_tiles_lose_is_what_bfloat16_loses(tiled_world: Callable[..., Tiled]) -> None:
    tiled = tiled_world([300], 4, 2, 64)
    exact = tiled.world.reference(0).float()
    error = (tiled.attend((0, 0, 300)).float() - exact).abs()
    assert float(error.max()) <= 2**-7 * float(exact.abs().max())  # two roundings, of weights and of the result


@heads_of_sizes
def test_decode_equals_prefill_equals_chunks_in_bits(
    tiled_world: Callable[..., Tiled], heads: int, groups: int, size: int
) -> None:
    length = 2 * KEYS + 2 * PAGE + 9
    tiled = tiled_world([length, 70], heads, groups, size)
    whole = tiled.attend((0, 0, length))
    for chunk in (1, 7, 16, 100):
        pieces = itertools.pairwise([*range(0, length, chunk), length])
        assert torch.equal(torch.cat([tiled.attend((0, *piece)) for piece in pieces]), whole)
    for position in (0, 1, 15, 16, 63, 64, 127, 128, length - 1):
        assert torch.equal(tiled.attend((1, 3, 70), (0, position, position + 1), (1, 0, 2))[67], whole[position])


def test_many_sequences_change_no_bit_of_one(tiled_world: Callable[..., Tiled]) -> None:
    lengths = [1 + 53 * index % 400 for index in range(41)]
    tiled = tiled_world(lengths, 4, 2, 32)
    together = tiled.attend(*((index, length - 1, length) for index, length in enumerate(lengths)))
    for index, length in enumerate(lengths):
        assert torch.equal(tiled.attend((index, length - 1, length))[0], together[index])


@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_lies_beyond_a_context_changes_no_bit(tiled_world: Callable[..., Tiled], poison: float) -> None:
    tiled = tiled_world([5, 16, 37, 64, 100], 6, 2, 48)
    rows = [(0, 4, 5), (1, 15, 16), (2, 30, 37), (3, 60, 64), (4, 0, 100)]
    clean = tiled.attend(*rows)
    for cache in tiled.caches:
        cache[cache.isnan()] = poison
    assert torch.equal(tiled.attend(*rows), clean)
    assert bool(clean.isfinite().all())


def test_another_heads_numbers_change_no_bit(tiled_world: Callable[..., Tiled]) -> None:
    tiled = tiled_world([90], 6, 2, 32)
    clean = tiled.attend((0, 0, 90))
    keys, values = from_tiles(*tiled.caches)
    keys[:, :, 1], values[:, :, 1] = torch.nan, torch.inf
    for cache, spoiled in zip(tiled.caches, as_tiles(keys, values), strict=True):
        cache.copy_(spoiled)
    assert torch.equal(tiled.attend((0, 0, 90))[:, :3], clean[:, :3])


def test_what_is_no_number_in_a_context_shows(tiled_world: Callable[..., Tiled]) -> None:
    tiled = tiled_world([40], 2, 1, 16)
    keys, values = from_tiles(*tiled.caches)
    keys[tiled.world.table[0, 1], 3] = torch.nan  # position 19
    tiled.caches[0].copy_(as_tiles(keys, values)[0])
    out = tiled.attend((0, 0, 40))
    assert bool(out[:19].isfinite().all())
    assert bool(out[19:].isnan().all())


def test_great_scores_neither_overflow_nor_vanish(tile_attention: Attention) -> None:
    world = World([80], 2, 1, 32)
    world.query[0] *= 300
    tiles = as_tiles(*world.caches)
    sequence, positions = torch.zeros(80, dtype=torch.long), torch.arange(80)
    arguments = (world.query[0], *tiles, world.table, sequence, positions, 1.0)
    torch.testing.assert_close(tile_attention(*arguments), tile_attention_reference(*arguments), atol=0.03, rtol=0.03)


def test_laying_blocks_out_and_back_gives_the_same() -> None:
    caches = [torch.randn(3, PAGE, 5, 48).bfloat16() for _ in "kv"]
    for given, found in zip(caches, from_tiles(*as_tiles(*caches)), strict=True):
        assert torch.equal(given, found)


def test_threads_do_not_disturb_each_other(tiled_world: Callable[..., Tiled]) -> None:
    tiled = tiled_world([200, 90], 4, 2, 64)
    rows = [((0, 0, 200),), ((1, 0, 90),), ((0, 199, 200), (1, 89, 90))] * 20
    expected = [tiled.attend(*row) for row in rows]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda row: tiled.attend(*row), rows))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_number_of_threads_changes_no_bit(tiled_world: Callable[..., Tiled]) -> None:
    tiled = tiled_world([300, 90, 1, 40, 7], 6, 2, 64)
    rows = [(0, 0, 300), (1, 40, 90), (2, 0, 1), (3, 39, 40), (4, 6, 7)]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(tiled.attend(*rows))
    torch.set_num_threads(before)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_products_of_the_library_keep_their_tiles(tiled_world: Callable[..., Tiled]) -> None:
    tiled = tiled_world([100], 4, 2, 64)
    x, weight = torch.randn(32, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    before = F.linear(x, weight)
    for _ in range(3):
        tiled.attend((0, 0, 100))
        assert torch.equal(F.linear(x, weight), before)


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (14, 2, 64), (5, 1, 80), (8, 8, 128)])
def test_a_machine_with_tiles_keeps_rows_apart(tile_attention: Attention, heads: int, groups: int, size: int) -> None:
    assert verify_invariance(heads, groups, size, tile_attention)


def test_attention_that_looks_at_its_neighbours_is_found_out(tile_attention: Attention) -> None:
    def leaning(query: torch.Tensor, *others: object) -> torch.Tensor:
        return tile_attention(query, *others) + 2**-6 * (len(query) > 1)  # type: ignore[arg-type]

    assert not verify_invariance(4, 2, 16, leaning)


def test_attention_that_is_none_is_found_out() -> None:
    assert not verify_invariance(4, 2, 16, lambda query, *others: torch.zeros_like(query))


def test_sizes_that_are_not_computed_here_are_named() -> None:
    assert takes(4, 2, 16)
    assert not any(takes(*sizes) for sizes in ((4, 2, 10), (4, 2, 40), (4, 2, 0), (4, 2, 272), (4, 3, 16)))


def test_disagreeing_arguments_are_refused(tile_attention: Attention) -> None:
    world = World([5], 4, 2, 16)
    keys, values = world.caches
    query, sequence, positions = world.asked([(0, 0, 5)])

    def refused(name: str, **changes: torch.Tensor) -> None:
        given = {"query": query, "key_cache": keys, "value_cache": values, "block_table": world.table}
        given |= {"sequence_of": sequence, "position_of": positions} | changes
        with pytest.raises(ShapeError, match=name):
            tile_attention(**given, scale=1.0)  # type: ignore[arg-type]

    refused("query", query=query.float())
    refused("query", query=torch.cat((query, query), dim=2)[..., :16])
    refused("key_cache", key_cache=keys[:, :8])
    refused("value_cache", value_cache=values[1:])
    refused("value_cache", value_cache=values.half())
    refused("a multiple of 16", query=query[..., :8], key_cache=keys[..., :8], value_cache=values[..., :8])
    refused("block_table", block_table=world.table.int())
    refused("sequence_of", sequence_of=sequence[1:])
    refused("position_of", position_of=positions.float())
