"""Attention of every sequence's newest token over its own context, on a GPU.

Numeric contract: attention_state.py; a row's bits depend on its own sequence alone and equal those that prefill gives.
One program takes a sequence, a head of the cache and a segment of 256 keys, so that a few long sequences keep the whole
device busy; the heads of a group stand together in a tile of 16 rows, and keys are read once for them all. Segments
are merged in ascending order, whoever does it: a second launch, or where counters are given the program that arrives
last at them, which leaves them at zero. The bits are the same; which is faster was not measured. Grids are upper
bounds, of the table's width: no length is looked at on the host, so that launches can be captured, and a program beyond
its sequence ends at once. Should a device's instructions for 16 rows and for 64 not agree, a tile of 64 rows
(`block_m`) takes those of prefill: it compiles, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_state import (
    FULL,
    SEGMENT,
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
from kernels.launch import device_of, launch_for, power_of_two
from kernels.shape import check_layout, check_shape


def decode_attention(
    query: Tensor,  # [S, H, D]
    key_cache: Tensor,  # [N, P, G, D]  same dtype, or float8
    value_cache: Tensor,  # [N, P, G, D]
    block_table: Tensor,  # [S, M] int32  block ids; entries beyond the context are never read
    context_len: Tensor,  # [S] int32  tokens, ≤ M · P, the new one included; 0 for a row of padding, answered by zeros
    scale: float,  # multiplies query·key before softmax
    variant: AttentionVariant = FULL,
    arrived: Tensor | None = None,  # [S or more, G] int32, zeros before and after: of one launch at a time
) -> Tensor:  # [S, H, D]
    """Return the attention of each sequence's newest token over the first `context_len[s]` tokens of its blocks.

    On a CPU, where the engine goes by `paged_attention`, the slow version answers.

    Raises:
        ShapeError: the shapes disagree, H is no multiple of G, or more than 16 heads share a key.

    Cost: one pass over `2 · context_len.sum() · G · D` elements of the cache; bound by memory bandwidth. Memory:
    S · H · ⌈M · P / 256⌉ · (D + 2) · 4 bytes of states.
    """
    check_attention(query, key_cache, value_cache, block_table, context_len, variant)
    check_shape("context_len", context_len, query.shape[0])
    if query.is_cuda:
        return decode_attention_triton(query, key_cache, value_cache, block_table, context_len, scale, variant, arrived)
    starts = torch.arange(query.shape[0] + 1)
    return attention_reference(query, key_cache, value_cache, block_table, starts, context_len, scale, variant)


def decode_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_len: Tensor,
    scale: float,
    variant: AttentionVariant,
    arrived: Tensor | None = None,
) -> Tensor:
    """Return `decode_attention` by the kernels.

    Raises:
        ShapeError: `arrived` has too few counters, or of another kind.
    """
    (sequences, heads, size), (_, page, groups, _) = query.shape, key_cache.shape
    width = block_table.shape[1]
    segments = -(-width * page // SEGMENT)
    states = query.new_empty(sequences, groups, segments, heads // groups, size + 2, dtype=torch.float32)
    out, (exponent, soft_cap) = torch.empty_like(query), in_powers_of_two(scale, variant)
    launch, layout = launched("decode_attention", query, key_cache)
    if arrived is not None:
        check_shape("arrived", arrived, max(sequences, arrived.shape[0]), groups)
        check_layout("arrived", arrived, torch.int32)
    lengths = context_len.contiguous()
    if out.numel() == 0:
        return out
    _decode_kernel[(sequences, groups, segments)](
        query,
        key_cache,
        value_cache,
        block_table.contiguous(),
        lengths,
        states,
        variant.sinks,
        out,
        arrived,
        exponent,
        variant.window,
        soft_cap,
        width,
        PAGE=page,
        TILE=TILE,
        BLOCK_M=launch.block_m,
        **layout,
        **launch.options,
    )
    if arrived is not None:
        return out
    _merge_kernel[(sequences, groups)](
        states,
        lengths,
        variant.sinks,
        out,
        variant.window,
        segments,
        BLOCK_R=power_of_two(heads // groups, least=1),
        **layout,
        **launch_for("merge_attention", size, device_of(query)).options,
    )
    return out


@jit
def _decode_kernel(
    query: Pointer,  # [sequences, GROUPS, RATIO, SIZE]
    key_cache: Pointer,  # [slots, GROUPS, SIZE]
    value_cache: Pointer,  # [slots, GROUPS, SIZE]
    block_table: Pointer,  # [sequences, table_width]
    context_len: Pointer,  # [sequences]
    states: Pointer,  # [sequences, GROUPS, segments, RATIO, SIZE + 2] float32: o, m, l
    sinks: Pointer,  # [GROUPS, RATIO] float32, or None
    out: Pointer,  # [sequences, GROUPS, RATIO, SIZE]
    arrived: Pointer,  # [sequences, GROUPS] int32, or None: segments are merged by another launch
    scale: float,
    window: Scalar,  # int, or None
    soft_cap: Scalar,  # float, or None
    table_width: int,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    sequence, group, segment = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_len + sequence).to(tl.int32)
    start, stop = segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, length)
    if window is not None:
        start = tl.maximum(start, tl.maximum(length - window, 0) // TILE * TILE)
    if start < stop:
        row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        real = (row < RATIO)[:, None] & (column < SIZE)[None, :]
        first = (sequence * GROUPS + group) * RATIO
        tile = tl.load(query + (first + row[:, None]) * SIZE + column[None, :], mask=real, other=0.0)
        highest, sums, weighted = segment_state(
            tile,
            tl.full([BLOCK_M], 0, tl.int32) + (length - 1),
            key_cache,
            value_cache,
            block_table + sequence * table_width,
            group,
            column,
            start,
            stop,
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
        state = states + (((sequence * GROUPS + group) * tl.num_programs(2) + segment) * RATIO + row) * (SIZE + 2)
        tl.store(state[:, None] + column[None, :], weighted, mask=real)
        tl.store(state + SIZE, highest, mask=row < RATIO)
        tl.store(state + SIZE + 1, sums, mask=row < RATIO)
    if arrived is not None:
        after, lowest = (length + SEGMENT - 1) // SEGMENT, 0
        if window is not None:
            lowest = tl.maximum(length - window, 0) // SEGMENT
        if (start < stop) | ((after == 0) & (segment == 0)):
            own = arrived + sequence * GROUPS + group
            tl.debug_barrier()  # what all threads of this program have stored is told of by the one that counts
            if tl.atomic_add(own, 1, sem="acq_rel") + 1 >= after - lowest:
                tl.store(own, 0)
                _merge(states, sinks, out, sequence, group, lowest, after, tl.num_programs(2), GROUPS, RATIO, SIZE,
                       BLOCK_D, BLOCK_M, PLAIN)  # fmt: skip


@jit
def _merge_kernel(
    states: Pointer,  # [sequences, GROUPS, segments, RATIO, SIZE + 2] float32: o, m, l
    context_len: Pointer,  # [sequences]
    sinks: Pointer,  # [GROUPS, RATIO] float32, or None
    out: Pointer,  # [sequences, GROUPS, RATIO, SIZE]
    window: Scalar,  # int, or None
    segments: int,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SEGMENT: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    sequence, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(context_len + sequence).to(tl.int32)
    lowest = 0
    if window is not None:
        lowest = tl.maximum(length - window, 0) // SEGMENT
    after = (length + SEGMENT - 1) // SEGMENT
    _merge(states, sinks, out, sequence, group, lowest, after, segments, GROUPS, RATIO, SIZE, BLOCK_D, BLOCK_R, PLAIN)


@jit
def _merge(
    states: Pointer,  # [sequences, GROUPS, segments, RATIO, SIZE + 2] float32: o, m, l
    sinks: Pointer,  # [GROUPS, RATIO] float32, or None
    out: Pointer,  # [sequences, GROUPS, RATIO, SIZE]
    sequence: Block,
    group: Block,
    lowest: Block,  # the first segment
    after: Block,  # the segment after the last
    segments: Block,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    """Write the attention of a sequence's row of each head of a group from the states of its segments."""
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    real = (row < RATIO)[:, None] & (column < SIZE)[None, :]
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_R], tl.float32)
    weighted = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for segment in range(lowest, after):
        state = states + (((sequence * GROUPS + group) * segments + segment) * RATIO + row) * (SIZE + 2)
        next_highest = tl.load(state + SIZE, mask=row < RATIO, other=0.0)
        next_sums = tl.load(state + SIZE + 1, mask=row < RATIO, other=0.0)
        next_weighted = tl.load(state[:, None] + column[None, :], mask=real, other=0.0)
        highest, sums, weighted = merge_state(highest, sums, weighted, next_highest, next_sums, next_weighted)
    result = attended(highest, sums, weighted, sinks, group * RATIO + row, row < RATIO)
    write = out + ((sequence * GROUPS + group) * RATIO + row[:, None]) * SIZE + column[None, :]
    tl.store(write, narrow(result, out.dtype.element_ty, PLAIN), mask=real)
