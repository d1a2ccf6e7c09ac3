"""The softmax state of a row over some of its keys, walked and merged alike by decode and prefill on a GPU.

Numeric contract. Keys are taken in tiles of 64 inside segments of 256, both at *absolute* positions of the sequence. A
segment gives each row a state (m, l, o): its highest score, the sum of the weights, the weighted values; states are
merged in ascending order. Products go along the head, then along the tile, into one float32 accumulator each, and the
sum of the weights is a product with ones, whose order no layout of warps can change. A tile or segment that a row sees
nothing of changes no bit of it, and a zero at the end is positive. Hence prefill == decode == chunked == cache hit, in
bits, on a device whose matrix instructions agree at every height of a tile: a GPU has to show that, the interpreter
shows order and indexing. Weights are rounded to the dtype of the query before they are multiplied, as their sum is. A
cache may hold float8, see float8.py: keys and values are widened as they are read, and nothing else changes.

Scores are powers of two here: scale · log2(e) is multiplied in. The plain version for a CPU is paged_attention.py,
whose segments are of 512 keys: the bits of the two are different policies. A segment of 256 was not measured.

Source: Milakov and Gimelshein, 2018 (one-pass softmax); Dao et al., 2022; Kwon et al., SOSP 2023 (block tables).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.float8 import FLOAT8, check_caches, widened
from kernels.jit import INTERPRETED, Block, Pointer, jit, narrow, product, tl
from kernels.launch import Launch, device_of, launch_for, power_of_two
from kernels.shape import ShapeError, check_shape

TILE = 64  # keys of a product
SEGMENT = 256  # keys of a state, a multiple of TILE
MOST_RATIO = 16  # heads that share a key
MOST_ELEMENTS = 1 << 31  # of a layer's keys: where they lie is counted in 32 bits
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """What some families of models change."""

    window: int | None = None  # a row sees this many keys, its own included, ≥ 1; None: all before it
    soft_cap: float | None = None  # c > 0: scores become c · tanh(score / c); None: they stay
    sinks: Tensor | None = None  # [H] float32  a further score of each head, of a key whose value is zero


FULL = AttentionVariant()


@jit
def segment_state(
    query: Block,  # [R, BLOCK_D]
    position: Block,  # [R] int32  a row sees the keys at positions ≤ its own
    key_cache: Pointer,  # [slots, GROUPS, SIZE]  dtype of the query, or float8
    value_cache: Pointer,  # [slots, GROUPS, SIZE]
    table: Pointer,  # [M]  the blocks of this sequence
    group: Block,  # the head of the cache
    columns: Block,  # [BLOCK_V] those of the values that are asked for
    start: Block,  # the first key, a multiple of TILE
    stop: Block,  # the key after the last; none from there on is read
    scale: Block,  # as `in_powers_of_two` gives it
    window: Block,  # or None
    soft_cap: Block,  # as `in_powers_of_two` gives it, or None
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PLAIN: tl.constexpr,
) -> Block:
    """Return m [R], l [R] and o [R, BLOCK_V] of the keys from start to stop."""
    rows: tl.constexpr = query.shape[0]
    column = tl.arange(0, BLOCK_D)[None, :]
    of_values = columns[None, :]
    ones = narrow(tl.full([TILE, 8], 1.0, tl.float32), query.dtype, PLAIN)
    highest = tl.full([rows], float("-inf"), tl.float32)
    sums = tl.zeros([rows, 8], tl.float32)  # every column the same
    weighted = tl.zeros([rows, columns.shape[0]], tl.float32)
    for at in range(start, stop, TILE):
        key = at + tl.arange(0, TILE)
        stored = tl.minimum(key, stop - 1)  # beyond the last key that one again, where nobody sees it
        slot = tl.load(table + stored // PAGE).to(tl.int32) * PAGE + stored % PAGE
        row = slot[:, None] * (GROUPS * SIZE)
        if SIZE == BLOCK_D:
            keys = tl.load(key_cache + group * SIZE + (row + column))
            values = tl.load(value_cache + group * SIZE + (row + of_values))
        else:
            keys = tl.load(key_cache + group * SIZE + (row + column), mask=column < SIZE, other=0.0)
            values = tl.load(value_cache + group * SIZE + (row + of_values), mask=of_values < SIZE, other=0.0)
        keys = widened(keys, query.dtype, PLAIN)
        scores = product(query, keys.T, tl.zeros([rows, TILE], tl.float32), PLAIN) * scale
        if soft_cap is not None:
            scores = soft_cap * tanh(scores)
        distance = position[:, None] - key[None, :]
        if window is None:
            scores = tl.where(distance >= 0, scores, float("-inf"))
        else:  # one comparison: what lies ahead wraps around to more than any window
            scores = tl.where(distance.to(tl.uint32, bitcast=True) < window.to(tl.uint32), scores, float("-inf"))
        before = highest
        highest = tl.maximum(before, tl.max(scores, axis=1))
        shift = finite(highest)
        fade = tl.exp2(before - shift)[:, None]
        weights = narrow(tl.exp2(scores - shift[:, None]), query.dtype, PLAIN)
        sums = product(weights, ones, sums * fade, PLAIN)
        weighted = product(weights, widened(values, query.dtype, PLAIN), weighted * fade, PLAIN)
    return highest, tl.max(sums, axis=1), weighted


@jit
def merge_state(
    highest: Block,  # [R]
    sums: Block,  # [R]
    weighted: Block,  # [R, D]
    next_highest: Block,  # of later keys
    next_sums: Block,
    next_weighted: Block,
) -> Block:
    """Return the state over the keys of both. An empty side changes no bit of the other."""
    merged = tl.maximum(highest, next_highest)
    shift = finite(merged)
    fade, next_fade = tl.exp2(highest - shift), tl.exp2(next_highest - shift)
    weighted = weighted * fade[:, None] + next_weighted * next_fade[:, None]
    return merged, sums * fade + next_sums * next_fade, weighted


@jit
def attended(highest: Block, sums: Block, weighted: Block, sinks: Pointer, head: Block, real: Block) -> Block:
    """Return the attention of rows [R] of heads `head`, those that are `real`, whose keys have all been merged."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
        highest, sums, weighted = merge_state(
            highest, sums, weighted, sink, tl.full(sums.shape, 1.0, tl.float32), tl.zeros(weighted.shape, tl.float32)
        )
    return weighted / tl.where(sums > 0, sums, 1.0)[:, None] + 0.0


@jit
def finite(highest: Block) -> Block:
    """Where nothing was seen yet, shift by 0 instead of −∞, whose difference with itself is NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@jit
def tanh(x: Block) -> Block:
    """Return the hyperbolic tangent to within 1e-6."""
    root = tl.rsqrt(1.0 + tl.exp2(x * 2.8853900817779268))  # e to the power 2x; a division takes more registers
    return 1.0 - 2.0 * root * root


def in_powers_of_two(scale: float, variant: AttentionVariant) -> tuple[float, float | None]:
    """Return the scale and the soft cap as the kernels take them: scores by log2(e), what is capped by its cap."""
    if variant.soft_cap is None:
        return scale * LOG2_E, None
    return scale / variant.soft_cap, variant.soft_cap * LOG2_E


def launched(operation: str, query: Tensor, key_cache: Tensor) -> tuple[Launch, dict[str, int]]:
    """Return how an operation is launched on such a cache, and the constants that all kernels of attention take."""
    (_, heads, size), (_, _, groups, _) = query.shape, key_cache.shape
    name = f"{operation}_float8" if key_cache.dtype == FLOAT8 else operation
    layout = {"GROUPS": groups, "RATIO": heads // groups, "SIZE": size, "BLOCK_D": power_of_two(size)}
    return launch_for(name, size, device_of(query)), layout | {"SEGMENT": SEGMENT, "PLAIN": INTERPRETED}


def check_attention(
    query: Tensor,  # [T, H, D]
    key_cache: Tensor,  # [N, P, G, D]
    value_cache: Tensor,  # [N, P, G, D]
    block_table: Tensor,  # [S, M]
    context_len: Tensor,  # [S]
    variant: AttentionVariant,
) -> None:
    """Raise ShapeError unless the arguments agree."""
    _, heads, size = query.shape
    groups = key_cache.shape[2]
    check_shape("key_cache", key_cache, *key_cache.shape[:2], groups, size)
    check_shape("value_cache", value_cache, *key_cache.shape)
    check_shape("block_table", block_table, context_len.shape[0], block_table.shape[1])
    if heads % groups or not 1 <= heads // groups <= MOST_RATIO:
        raise ShapeError(f"{heads} heads on {groups} in the cache: a multiple of them, at most {MOST_RATIO} on one")
    if variant.sinks is not None:
        check_shape("variant.sinks", variant.sinks, heads)
    if variant.window is not None and variant.window < 1:
        raise ShapeError(f"`variant.window` is {variant.window}: a row sees at least itself")
    if variant.soft_cap is not None and not variant.soft_cap > 0:
        raise ShapeError(f"`variant.soft_cap` is {variant.soft_cap}, not above 0")
    if key_cache.numel() >= MOST_ELEMENTS:
        raise ShapeError(f"`key_cache` has {key_cache.numel()} elements, and a kernel counts to {MOST_ELEMENTS}")
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if not tensor.is_contiguous():
            raise ShapeError(f"`{name}` is not contiguous")
    check_caches(query.dtype, key_cache, value_cache)


def attention_reference(
    query: Tensor,  # [T, H, D]
    key_cache: Tensor,  # [N, P, G, D]
    value_cache: Tensor,  # [N, P, G, D]
    block_table: Tensor,  # [S, M]
    starts: Tensor,  # [S + 1]  the tokens of sequence s are starts[s] … starts[s + 1] − 1
    context_len: Tensor,  # [S]  tokens stored, those of the query included
    scale: float,
    variant: AttentionVariant,
) -> Tensor:  # [T, H, D]
    """Return the same in float64, token by token and head by head."""
    page, ratio = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    out = torch.empty_like(query)
    for sequence, length in enumerate(context_len.tolist()):
        first, after = starts[sequence : sequence + 2].tolist()
        for token in range(first, after):
            position = length - (after - token)
            lowest = 0 if variant.window is None else max(0, position + 1 - variant.window)
            seen = torch.arange(lowest, position + 1, device=query.device)
            blocks, offsets = block_table[sequence].long()[seen // page], seen % page
            for head in range(query.shape[1]):
                keys, values = (cache[blocks, offsets, head // ratio].double() for cache in (key_cache, value_cache))
                scores = keys @ query[token, head].double() * scale
                if variant.soft_cap is not None:
                    scores = variant.soft_cap * torch.tanh(scores / variant.soft_cap)
                if variant.sinks is not None:
                    scores = torch.cat((scores, variant.sinks[head : head + 1].double()))
                out[token, head] = (torch.softmax(scores, dim=0)[: len(seen)] @ values).to(query.dtype)
    return out
