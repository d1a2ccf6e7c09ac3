"""Attention over the paged cache in bfloat16 by tiles: nothing is gathered, nothing is planned.

By the matrix tiles of AMX where the CPU has them, else by its products of pairs, a few rows at a time.

Numeric contract. A row is a token and a head. Its keys are taken 64 at a time at *absolute* positions, in ascending
order, for every row alike: scores by page, the head's numbers 32 at a time or two; the greatest so far; weights 2ˣ,
rounded to bfloat16; their sum, four times sixteen lanes; weighted values by page; both added to what came before, which
is scaled first. No instruction mixes rows, so that a row has the same bits in whatever tile it stands, beside whatever:
prefill == decode == chunked == cache hit. Keys that a row may not see have the weight 0. Of the last
page, values of tokens beyond the tile's last are zeroed first, since 0 · NaN is not 0; scores of theirs are replaced.
Keys that a row may not see change no bit, unless they are its own sequence's and not finite.

A block of the cache has as many elements as it has in [P, G, D], and lies in it as tiles want it: what two rows of a
tile's right side multiply stands side by side. tile_rope_store.py writes it.

    keys    [G, D / 2, P, 2]  a pair of numbers, of 16 keys: D / 32 tiles
    values  [G, P / 2, D, 2]  a pair of keys, of 16 numbers: D / 16 half tiles

Source: Kwon et al., SOSP 2023 (block tables); Milakov and Gimelshein, 2018 (one-pass softmax); Dao et al., 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.compilation import compiled, part
from kernels.lanes import (
    LANES,
    MOST_ROWS,
    SHAPES_BYTES,
    TILES,
    add_products,
    bits_of,
    claim,
    copy_masked,
    copy_sixteen,
    fill,
    first_of,
    give_tiles_back,
    greater,
    greatest_of,
    has_pairs,
    integer_at,
    minus,
    number_at,
    only_first,
    over,
    plus,
    power_of_two,
    prefetch,
    put_halves,
    put_integer,
    put_number,
    put_sixteen,
    put_tile,
    rounded,
    sixteen_at,
    sum_of,
    take_tiles,
    tile_at,
    tile_product,
    tile_zero,
    times,
)
from kernels.paged_attention import paged_attention_reference
from kernels.shape import ShapeError, check_layout, check_shape
from kernels.team import COME, TAKEN, run, scratch, threads_for

PAGE = 16  # tokens of a block
ROWS = 16  # of a tile
KEYS = 64  # of a turn, four pages
LOG2E = math.log2(math.e)

# A turn's workspace, in bytes from its beginning. Rows of 64 float32, of 64 bfloat16, of D of either.
_SEEN = 0  # int64 of each row: how many keys it sees in all
_MAXIMA = _SEEN + ROWS * 8
_TOTALS = _MAXIMA + ROWS * 4
_SHAPES = _TOTALS + ROWS * 4
_SCORES = _SHAPES + SHAPES_BYTES
_WEIGHTS = _SCORES + ROWS * KEYS * 4
_QUERIES = _WEIGHTS + ROWS * KEYS * 2  # D bfloat16 a row; then _sums, _added: D float32 a row; _tail: a page
# Four tiles for sums, then the left and the right side of a product of depth 32, and of depth 16.
_SUM_BYTES = 64 << 48 | 64 << 32 | 64 << 16 | 64
_SIDE_BYTES = 64 << 48 | 32 << 32 | 64 << 16 | 64
_TILE_ROWS = 8 << 56 | 16 << 48 | 16 << 40 | 16 << 32 | 16 << 24 | 16 << 16 | 16 << 8 | 16
_NOTHING_YET = np.float32(-np.inf)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]  # as `tile_attention`
_ZERO = np.float32(0)


def takes(heads: int, groups: int, size: int) -> bool:
    """Return whether heads of this size are computed here."""
    return size % 16 == 0 and 16 <= size <= 256 and heads % groups == 0


def tile_attention(
    query: Tensor,  # [T, H, D]  bfloat16; D a multiple of 16
    key_cache: Tensor,  # [N, P, G, D]  same dtype, blocks laid out as above; P = 16
    value_cache: Tensor,  # [N, P, G, D]
    block_table: Tensor,  # [S, M] int64  block ids < N; entries beyond a sequence's context are never used
    sequence_of: Tensor,  # [T] int64  which sequence each token belongs to, in runs, < S
    position_of: Tensor,  # [T] int64  its absolute position, ascending by one within a run, < M · P
    scale: float,  # multiplies query·key before softmax
    tiles: bool = TILES,  # by tiles, which the CPU must have; or by pairs
) -> Tensor:  # [T, H, D]
    """Return the attention of each token over its own sequence up to itself; its own key is stored already.

    Token t reads the blocks that hold positions 0 … its own of its own sequence and nothing else of the pool.

    Raises:
        ShapeError: an argument disagrees with the shapes or dtypes above.

    Cost: one pass over the keys and values of each sequence for every 16 rows of a group; for few rows bound by memory.
    """
    tokens, heads, size = query.shape
    groups = key_cache.shape[2]
    check_shape("key_cache", key_cache, key_cache.shape[0], PAGE, groups, size)
    check_shape("value_cache", value_cache, *key_cache.shape)
    if not takes(heads, groups, size):
        raise ShapeError(f"{heads} heads in {groups} groups of {size}: a head must be a multiple of 16, at most 256")
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_layout(name, tensor, torch.bfloat16)
    check_shape("sequence_of", sequence_of, tokens)
    check_shape("position_of", position_of, tokens)
    for name, tensor in (("block_table", block_table), ("sequence_of", sequence_of), ("position_of", position_of)):
        check_layout(name, tensor, torch.int64)
    out = torch.empty_like(query)
    together = max(1, min(ROWS, tokens // ROWS))  # tokens of an item
    items = -(-tokens // together)
    threads = threads_for(items)
    space = scratch(threads * _space(size))
    run(
        _kernel(size, tiles),
        threads,
        items,
        together,
        space,
        query,
        key_cache,
        value_cache,
        out,
        block_table,
        block_table.shape[1],
        sequence_of,
        position_of,
        tokens,
        heads,
        groups,
        bits_of(scale * LOG2E),
    )
    return out


def _space(size: int) -> int:
    """Return the bytes of one thread's workspace."""
    return _QUERIES + 192 * size


@cache
def _kernel(size: int, tiles: bool) -> int:
    """Return the kernel for heads of a size: its loops over a head are straight lines."""
    if not has_pairs():
        raise RuntimeError("this CPU does not multiply pairs of bfloat16; ask `has_pairs` first")
    space, by_tiles = _space(size), int(tiles)

    def attend(data: int) -> None:
        items, together, tokens = integer_at(data + 16), integer_at(data + 24), integer_at(data + 104)
        at = integer_at(data + 32) + claim(data + COME) * space
        if by_tiles:
            take_tiles(at + _SHAPES, _SUM_BYTES, _SIDE_BYTES, _TILE_ROWS)
        item = claim(data + TAKEN)
        while item < items:
            first = (items - 1 - item) * together  # the last tokens of a prompt see the most
            _attend(at, data, first, min(first + together, tokens), size, by_tiles)
            item = claim(data + TAKEN)
        if by_tiles:
            give_tiles_back(at + _SHAPES)

    return compiled(attend)


@part
def _attend(at: int, data: int, first: int, last: int, size: int, tiles: int) -> None:
    """Tokens from `first` to before `last`, run by run."""
    query, keys, values, out = (
        integer_at(data + 40),
        integer_at(data + 48),
        integer_at(data + 56),
        integer_at(data + 64),
    )
    table, width, sequences = integer_at(data + 72), integer_at(data + 80), integer_at(data + 88)
    positions, heads, groups = integer_at(data + 96), integer_at(data + 112), integer_at(data + 120)
    scale, block = number_at(data + 128), groups * PAGE * size * 2
    ratio, begin = heads // groups, first
    while begin < last:
        sequence = integer_at(sequences + begin * 8)
        end = begin + 1
        while end < last and integer_at(sequences + end * 8) == sequence:
            end += 1
        blocks, position = table + sequence * width * 8, integer_at(positions + begin * 8)
        for group in range(groups):
            page = group * PAGE * size * 2  # bytes, within a block
            start = (begin * heads + group * ratio) * size * 2  # of the run's first row
            for row in range(0, (end - begin) * ratio, ROWS):
                rows = min(ROWS, (end - begin) * ratio - row)
                _attend_tile(
                    at, query + start, keys + page, values + page, out + start, blocks, position, row, rows, ratio,
                    heads, block, size, scale, tiles,
                )  # fmt: skip
        begin = end


@part
def _attend_tile(
    at: int,  # the workspace
    query: int,  # of the group's first head, of the run's first token
    keys: int,  # of the group, of block 0
    values: int,
    out: int,  # as `query`
    blocks: int,  # the sequence's row of the block table
    position: int,  # of the run's first token
    row: int,  # the tile's first, of the run: token · ratio + head of the group
    rows: int,
    ratio: int,
    heads: int,
    block: int,  # bytes
    size: int,
    scale: float,
    tiles: int,
) -> None:
    for one in range(rows):
        token, head = divmod(row + one, ratio)
        source, to = query + (token * heads + head) * size * 2, at + _QUERIES + one * size * 2
        for column in range(0, size * 2, 32):
            copy_sixteen(to + column, source + column)
        for column in range(0, size * 4, 64):
            put_sixteen(at + _QUERIES + 32 * size + one * size * 4 + column, fill(_ZERO))
        put_integer(at + _SEEN + one * 8, position + token + 1)
        put_number(at + _MAXIMA + one * 4, _NOTHING_YET)
        put_number(at + _TOTALS + one * 4, _ZERO)
    seen = integer_at(at + _SEEN + (rows - 1) * 8)  # by the last row, the most
    for start in range(0, seen, KEYS):
        pages = blocks + start // PAGE * 8
        left = seen - start
        _prefetch_turn(keys, values, pages + 32, block, size, min(KEYS, left - KEYS))
        if tiles:
            _score_turn(at, keys, pages, block, size, min(KEYS, left))
        else:
            _score_pairs(at, keys, pages, block, size, min(KEYS, left), rows)
        for one in range(rows):
            mine = integer_at(at + _SEEN + one * 8) - start
            if mine > 0:
                _weigh(at, one, mine, size, scale)
        if left < KEYS and left % PAGE:
            tail = at + _QUERIES + 160 * size
            _copy_first(tail, values + integer_at(pages + left // PAGE * 8) * block, left % PAGE, size)
        if tiles:
            _weighted_values(at, values, pages, block, size, left)
        else:
            _value_pairs(at, values, pages, block, size, left, rows)
        for one in range(rows):
            if integer_at(at + _SEEN + one * 8) > start:
                sums = at + _QUERIES + 32 * size + one * size * 4
                for column in range(sums, sums + size * 4, 64):
                    put_sixteen(column, plus(sixteen_at(column), sixteen_at(column + 64 * size)))
    for one in range(rows):
        token, head = divmod(row + one, ratio)
        total, sums = fill(number_at(at + _TOTALS + one * 4)), at + _QUERIES + 32 * size + one * size * 4
        for column in range(0, size, 16):
            mean = over(sixteen_at(sums + column * 4), total)
            put_halves(out + ((token * heads + head) * size + column) * 2, mean)


@part
def _prefetch_turn(keys: int, values: int, pages: int, block: int, size: int, count: int) -> None:
    """Have `count` keys and values of a turn, which may be negative, on their way."""
    for page in range((count + PAGE - 1) // PAGE):
        place = integer_at(pages + page * 8) * block
        for line in range(0, PAGE * size * 2, 64):
            prefetch(keys + place + line)
            prefetch(values + place + line)


@part
def _score_turn(at: int, keys: int, pages: int, block: int, size: int, count: int) -> None:
    """Scores of the pages that hold a turn's first `count` keys; of others what stood there stays."""
    queries, stride = at + _QUERIES, size * 2
    for page in range((count + PAGE - 1) // PAGE):
        source = keys + integer_at(pages + page * 8) * block
        tile_zero(0)
        for chunk in range(size // 32):
            tile_at(4, queries + chunk * 64, stride)
            tile_at(5, source + chunk * 1024, 64)
            tile_product(0, 4, 5)
        if size % 32:
            rest = size // 32 * 1024
            tile_at(6, queries + rest // 16, stride)
            tile_at(7, source + rest, 64)
            tile_product(0, 6, 7)
        put_tile(0, at + _SCORES + page * 64, KEYS * 4)


@part
def _score_pairs(at: int, keys: int, pages: int, block: int, size: int, count: int, rows: int) -> None:
    """What `_score_turn` does, without tiles."""
    stride, rest = size * 2, size // 32 * 64
    for page in range((count + PAGE - 1) // PAGE):
        source = keys + integer_at(pages + page * 8) * block
        for row in range(0, rows, MOST_ROWS):
            some, queries = min(MOST_ROWS, rows - row), at + _QUERIES + row * stride
            scores = at + _SCORES + row * KEYS * 4 + page * 64
            for one in range(some):
                put_sixteen(scores + one * KEYS * 4, fill(_ZERO))
            add_products(1, 16, 0, (scores, KEYS * 4), (queries, stride, 64), (source, 64, 1024, 0), some, size // 32)
            if size % 32:
                left, right = (queries + rest, stride, 0), (source + rest * LANES, 64, 0, 0)
                add_products(1, 8, 0, (scores, KEYS * 4), left, right, some, 1)


@part
def _weigh(at: int, row: int, seen: int, size: int, scale: float) -> None:
    """Scores of one row → weights, of the turn's first `seen` keys; what is summed up already is scaled to them."""
    scores, factor = at + _SCORES + row * KEYS * 4, fill(scale)
    a, b = times(sixteen_at(scores), factor), times(sixteen_at(scores + 64), factor)
    c, d = times(sixteen_at(scores + 128), factor), times(sixteen_at(scores + 192), factor)
    if seen < KEYS:
        a, b = only_first(a, seen), only_first(b, seen - 16)
        c, d = only_first(c, seen - 32), only_first(d, seen - 48)
    before = number_at(at + _MAXIMA + row * 4)
    greatest = greatest_of(greater(greater(a, b), greater(c, d)))
    if before > greatest:
        greatest = before
    put_number(at + _MAXIMA + row * 4, greatest)
    shift = fill(greatest)
    a, b = rounded(power_of_two(minus(a, shift))), rounded(power_of_two(minus(b, shift)))
    c, d = rounded(power_of_two(minus(c, shift))), rounded(power_of_two(minus(d, shift)))
    weights = at + _WEIGHTS + row * KEYS * 2
    put_halves(weights, a)
    put_halves(weights + 32, b)
    put_halves(weights + 64, c)
    put_halves(weights + 96, d)
    kept = power_of_two(minus(fill(before), shift))
    total = number_at(at + _TOTALS + row * 4) * first_of(kept)
    put_number(at + _TOTALS + row * 4, total + sum_of(plus(plus(a, b), plus(c, d))))
    sums = at + _QUERIES + 32 * size + row * size * 4
    for column in range(sums, sums + size * 4, 64):
        put_sixteen(column, times(sixteen_at(column), kept))


@part
def _weighted_values(at: int, values: int, pages: int, block: int, size: int, count: int) -> None:
    """Weights · values of the turn's first `count` keys."""
    added, tail, stride = at + _QUERIES + 96 * size, at + _QUERIES + 160 * size, size * 4
    for column in range(0, stride, 256):
        tile_zero(0)
        tile_zero(1)
        tile_zero(2)
        tile_zero(3)
        for page in range((min(count, KEYS) + PAGE - 1) // PAGE):
            source = tail if page == count // PAGE else values + integer_at(pages + page * 8) * block
            source += column
            tile_at(6, at + _WEIGHTS + page * PAGE * 2, KEYS * 2)
            tile_at(7, source, stride)
            tile_product(0, 6, 7)
            if column + 64 < stride:
                tile_at(7, source + 64, stride)
                tile_product(1, 6, 7)
            if column + 128 < stride:
                tile_at(7, source + 128, stride)
                tile_product(2, 6, 7)
            if column + 192 < stride:
                tile_at(7, source + 192, stride)
                tile_product(3, 6, 7)
        put_tile(0, added + column, stride)
        if column + 64 < stride:
            put_tile(1, added + column + 64, stride)
        if column + 128 < stride:
            put_tile(2, added + column + 128, stride)
        if column + 192 < stride:
            put_tile(3, added + column + 192, stride)


@part
def _value_pairs(at: int, values: int, pages: int, block: int, size: int, count: int, rows: int) -> None:
    """What `_weighted_values` does, without tiles."""
    added, tail, stride = at + _QUERIES + 96 * size, at + _QUERIES + 160 * size, size * 4
    for row in range(0, rows, MOST_ROWS):
        some, sums = min(MOST_ROWS, rows - row), added + row * stride
        for place in range(sums, sums + some * stride, 64):
            put_sixteen(place, fill(_ZERO))
        for page in range((min(count, KEYS) + PAGE - 1) // PAGE):
            source = tail if page == count // PAGE else values + integer_at(pages + page * 8) * block
            weights = (at + _WEIGHTS + row * KEYS * 2 + page * PAGE * 2, KEYS * 2, 0)
            for column in range(0, stride - 64, 128):
                add_products(2, 8, 0, (sums + column, stride), weights, (source + column, stride, 0, 64), some, 1)
            if stride % 128:
                last = stride - 64
                add_products(1, 8, 0, (sums + last, stride), weights, (source + last, stride, 0, 64), some, 1)


@part
def _copy_first(to: int, source: int, count: int, size: int) -> None:
    """Copy the values of the first `count` keys of a page; the rest is zero."""
    for pair in range(PAGE // 2):
        left = count - 2 * pair
        mask = 0xFFFFFFFF if left > 1 else 0xFFFF if left == 1 else 0
        for place in range(pair * size * 4, (pair + 1) * size * 4, 64):
            copy_masked(to + place, source + place, mask)


def as_tiles(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return caches [N, P, G, D] with every block laid out as above, in plain torch."""
    blocks, page, groups, size = keys.shape
    pairs = keys.view(blocks, page, groups, size // 2, 2).permute(0, 2, 3, 1, 4)
    rows = values.view(blocks, page // 2, 2, groups, size).permute(0, 3, 1, 4, 2)
    return pairs.reshape(keys.shape), rows.reshape(values.shape)


def from_tiles(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `as_tiles` was given."""
    blocks, page, groups, size = keys.shape
    pairs = keys.view(blocks, groups, size // 2, page, 2).permute(0, 3, 1, 2, 4)
    rows = values.view(blocks, groups, page // 2, size, 2).permute(0, 2, 4, 1, 3)
    return pairs.reshape(keys.shape), rows.reshape(values.shape)


def tile_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    sequence_of: Tensor,
    position_of: Tensor,
    scale: float,
) -> Tensor:
    """Return the same, one token and head at a time, in float64."""
    caches = from_tiles(key_cache, value_cache)
    return paged_attention_reference(query, *caches, block_table, sequence_of, position_of, scale)


def verify_invariance(heads: int, groups: int, size: int, attention: Attention = tile_attention) -> bool:
    """Return whether a row has the same bits here whatever is computed beside it, and those of attention.

    Tried: a prompt at once, in pieces, its tokens each alone and among others of another sequence. What was not written
    is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (2 * KEYS + PAGE + 3, KEYS - 5)
    blocks = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(blocks) + 1, generator=generator)
    table = torch.full((2, blocks[0]), int(order[-1]))  # nobody's block, beyond a context
    caches = [torch.full((len(order), PAGE, groups, size), torch.nan, dtype=torch.bfloat16) for _ in "kv"]
    for index, length in enumerate(lengths):
        table[index, : blocks[index]] = order[index * blocks[0] :][: blocks[index]]
        at = torch.arange(length)
        for one in caches:
            one[table[index, at // PAGE], at % PAGE] = torch.randn(length, groups, size, generator=generator).bfloat16()
    sequence_of = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    position_of = torch.cat([torch.arange(length) for length in lengths])
    query = torch.randn(sum(lengths), heads, size, generator=generator).bfloat16()
    keys, values = as_tiles(*caches)

    def attend(tokens: Tensor) -> Tensor:
        return attention(query[tokens], keys, values, table, sequence_of[tokens], position_of[tokens], size**-0.5)

    every = torch.arange(len(query))
    whole = attend(every)
    for piece in (
        *torch.split(every, 1),
        *torch.split(every, 7),
        torch.cat((every[-3:], every[: KEYS + 1])),
        every[5 - lengths[1] :],
    ):
        if not torch.equal(attend(piece), whole[piece]):
            return False
    some = torch.tensor([0, PAGE, KEYS - 1, KEYS, lengths[0] - 1, lengths[0], len(query) - 1])
    exact = tile_attention_reference(query[some], keys, values, table, sequence_of[some], position_of[some], size**-0.5)
    return torch.allclose(whole[some].float(), exact.float(), atol=0.03, rtol=0.03)
