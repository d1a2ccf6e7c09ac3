"""Attention of many tokens of each sequence over its own context, on a GPU: prompts, chunks of them, verification.

Numeric contract: attention_state.py; a row's bits depend on its own sequence alone, not on where its chunk begins, and
equal those that decode gives. One program takes a head of the cache and a tile of rows, (token, head of the group) by
(token, head), of one sequence; it walks the segments of 256 keys that its rows see and merges them as decode does. A
tile of 128 rows reaches wgmma; of a head of 256 a program takes half the columns of the values, since the states of all
of them do not fit the registers. The grid is an upper bound, and a program finds its sequence by bisection, so that
no length is looked at on the host. Source: as attention_state.py; the flat grid of tiles is that of vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_state import (
    FULL,
    TILE,
    AttentionVariant,
    attended,
    attention_reference,
    check_attention,
    in_powers_of_two,
    launched,
    merge_state,
    segment_state,
)
from kernels.jit import Block, Pointer, Scalar, jit, narrow, tl
from kernels.shape import check_shape


def prefill_attention(
    query: Tensor,  # [T, H, D]  the tokens of the first sequence, of the second, …
    key_cache: Tensor,  # [N, P, G, D]  same dtype, or float8
    value_cache: Tensor,  # [N, P, G, D]
    block_table: Tensor,  # [S, M] int32  block ids; entries beyond the context are never read
    starts: Tensor,  # [S + 1] int32  sequence s has the tokens starts[s] … starts[s + 1] − 1; none is allowed
    context_len: Tensor,  # [S] int32  tokens stored, ≤ M · P, those of the query included: they are the last
    scale: float,  # multiplies query·key before softmax
    variant: AttentionVariant = FULL,
) -> Tensor:  # [T, H, D]
    """Return the attention of each token over the tokens of its sequence up to itself; none for tokens of no sequence.

    On a CPU, where the engine goes by `paged_attention`, the slow version answers.

    Raises:
        ShapeError: the shapes disagree, H is no multiple of G, or more than 16 heads share a key.

    Cost: 4 · D operations for every query's head and key that it sees; bound by the matrix units.
    """
    check_attention(query, key_cache, value_cache, block_table, context_len, variant)
    check_shape("starts", starts, context_len.shape[0] + 1)
    if query.is_cuda:
        return prefill_attention_triton(query, key_cache, value_cache, block_table, starts, context_len, scale, variant)
    return attention_reference(query, key_cache, value_cache, block_table, starts, context_len, scale, variant)


def prefill_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    starts: Tensor,
    context_len: Tensor,
    scale: float,
    variant: AttentionVariant,
) -> Tensor:
    """Return `prefill_attention` by the kernel."""
    tokens, (page, groups) = query.shape[0], key_cache.shape[1:3]
    sequences, width = block_table.shape
    out, (exponent, soft_cap) = torch.empty_like(query), in_powers_of_two(scale, variant)
    launch, layout = launched("prefill_attention", query, key_cache)
    if out.numel() == 0:
        return out
    tiles = tokens // (launch.block_m // layout["RATIO"]) + sequences
    columns = min(layout["BLOCK_D"], launch.block_n)
    _prefill_kernel[(tiles, groups, layout["BLOCK_D"] // columns)](
        query,
        key_cache,
        value_cache,
        block_table.contiguous(),
        starts.contiguous(),
        context_len.contiguous(),
        variant.sinks,
        out,
        exponent,
        variant.window,
        soft_cap,
        sequences,
        width,
        PAGE=page,
        BLOCK_V=columns,
        BLOCK_M=launch.block_m,
        TILE=TILE,
        **layout,
        **launch.options,
    )
    return out


@jit
def _prefill_kernel(
    query: Pointer,  # [tokens, GROUPS, RATIO, SIZE]
    key_cache: Pointer,  # [slots, GROUPS, SIZE]
    value_cache: Pointer,  # [slots, GROUPS, SIZE]
    block_table: Pointer,  # [sequences, table_width]
    starts: Pointer,  # [sequences + 1]
    context_len: Pointer,  # [sequences]
    sinks: Pointer,  # [GROUPS, RATIO] float32, or None
    out: Pointer,  # [tokens, GROUPS, RATIO, SIZE]
    scale: float,
    window: Scalar,  # int, or None
    soft_cap: Scalar,  # float, or None
    sequences: int,
    table_width: int,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    tile, group = tl.program_id(0), tl.program_id(1)
    TOKENS: tl.constexpr = BLOCK_M // RATIO
    sequence = sequence_of(tile, starts, sequences, TOKENS)
    first = tl.load(starts + sequence).to(tl.int32)
    count = tl.load(starts + sequence + 1).to(tl.int32) - first  # tokens of this sequence
    begin = (tile - first // TOKENS - sequence) * TOKENS  # the tile's first among them
    if begin >= count:
        return
    end = tl.minimum(begin + TOKENS, count)
    offset = tl.load(context_len + sequence).to(tl.int32) - count  # the position of the first of them

    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    token = begin + row // RATIO
    real = (row < TOKENS * RATIO) & (token < end)
    base = ((first + begin).to(tl.int64) * GROUPS + group) * (RATIO * SIZE)
    at = ((row // RATIO) * (GROUPS * RATIO) + row % RATIO)[:, None] * SIZE
    inside = real[:, None] & (column < SIZE)[None, :]
    queries = tl.load(query + base + at + column[None, :], mask=inside, other=0.0)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    lowest = 0
    if window is not None:
        lowest = tl.maximum(offset + begin + 1 - window, 0) // TILE * TILE
    for start in range(lowest // SEGMENT * SEGMENT, offset + end, SEGMENT):
        next_highest, next_sums, next_weighted = segment_state(
            queries,
            offset + token,
            key_cache,
            value_cache,
            block_table + sequence.to(tl.int64) * table_width,
            group,
            columns,
            tl.maximum(start, lowest),
            tl.minimum(start + SEGMENT, offset + end),
            scale,
            window,
            soft_cap,
            GROUPS,
            PAGE,
            SIZE,
            BLOCK_D,
            TILE,
            PLAIN,
        )
        highest, sums, weighted = merge_state(highest, sums, weighted, next_highest, next_sums, next_weighted)
    result = attended(highest, sums, weighted, sinks, group * RATIO + row % RATIO, real)
    inside = real[:, None] & (columns < SIZE)[None, :]
    tl.store(out + base + at + columns[None, :], narrow(result, out.dtype.element_ty, PLAIN), mask=inside)


@jit
def sequence_of(tile: Block, starts: Pointer, sequences: Block, TOKENS: tl.constexpr) -> Block:
    """Return the sequence that has `tile`: sequence s has those from starts[s] // TOKENS + s on."""
    low, high = tile * 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(starts + middle).to(tl.int32) // TOKENS + middle <= tile
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    return low
