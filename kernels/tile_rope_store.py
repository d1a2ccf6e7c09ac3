"""The norm of each head, rotary positions, and keys and values stored into a cache laid out for tile_attention.py.

Numeric contract: a token's bits depend on it and its position alone; rounded wherever rms_norm.py and rope.py of
rope_store.py, one after the other, round. Source: Su et al., 2021 (RoPE, in the half-rotated layout of Hugging Face).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.compilation import compiled, part
from kernels.lane_rms_norm import norm_row
from kernels.lanes import (
    LANES,
    bits_of,
    claim,
    copy_half,
    copy_pair,
    copy_sixteen,
    integer_at,
    minus,
    number_at,
    plus,
    put_halves,
    put_number,
    sixteen_at,
    sixteen_halves_at,
    times,
)
from kernels.rope_store import HeadNorm, rope, store_kv
from kernels.shape import ShapeError, check_layout, check_shape
from kernels.team import COME, TAKEN, run, scratch, shares, threads_for
from kernels.tile_attention import PAGE, as_tiles

_LEAST = 1 << 14  # numbers that are worth another thread


def tile_rope_store(
    qkv: Tensor,  # [T, (H + 2G) · D]  bfloat16: the heads of the query, of the key, of the value; D a multiple of 16
    norm: HeadNorm | None,
    cos: Tensor,  # [T, D/2] float32, of each token's position
    sin: Tensor,  # [T, D/2] float32
    slots: Tensor,  # [T] int64  block · P + offset; no slot twice
    key_cache: Tensor,  # [N, P, G, D]  same dtype, changed in place, blocks laid out for tiles; P = 16
    value_cache: Tensor,  # [N, P, G, D]
) -> Tensor:  # [T, H, D]
    """Return the query, normed and rotated; the key, treated alike, and the value go into their slots.

    Raises:
        ShapeError: the shapes or the dtypes disagree.
    """
    tokens, (page, groups, size) = qkv.shape[0], key_cache.shape[1:]
    heads = qkv.shape[1] // size - 2 * groups
    if heads < 1 or qkv.shape[1] % size or size % LANES or page != PAGE:
        raise ShapeError(f"`qkv` {list(qkv.shape)} does not hold a query, key and value for {groups} heads of {size}")
    check_shape("slots", slots, tokens)
    check_layout("slots", slots, torch.int64)
    check_shape("value_cache", value_cache, *key_cache.shape)
    for name, angles in (("cos", cos), ("sin", sin)):
        check_shape(name, angles, tokens, size // 2)
        check_layout(name, angles, torch.float32)
    for name, tensor in (("qkv", qkv), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_layout(name, tensor, torch.bfloat16)
    if norm is not None:
        for name, weight in (("norm.query", norm.query), ("norm.key", norm.key)):
            check_shape(name, weight, size)
            check_layout(name, weight, torch.bfloat16)
    query = qkv.new_empty(tokens, heads, size)
    together = shares(tokens, -(-_LEAST // qkv.shape[1]))
    items = -(-tokens // together)
    threads = threads_for(items)
    space = scratch(threads * 4 * _bytes(size))
    run(
        _kernel(size),
        threads,
        items,
        together,
        space,
        qkv,
        None if norm is None else norm.query,
        None if norm is None else norm.key,
        bits_of(0.0 if norm is None else norm.epsilon),
        cos,
        sin,
        slots,
        query,
        key_cache,
        value_cache,
        tokens,
        heads,
        groups,
    )
    return query


def _bytes(size: int) -> int:
    """Return what the numbers of a head take, or half a head's angles, with what lanes beyond half a head write."""
    return size * 2 + LANES * 4


_bytes_of = part(_bytes)


@cache
def _kernel(size: int) -> int:
    """Return the kernel for heads of a size."""
    space = 4 * _bytes(size)

    def rope_store(data: int) -> None:
        items, together, tokens = integer_at(data + 16), integer_at(data + 24), integer_at(data + 120)
        at = integer_at(data + 32) + claim(data + COME) * space
        item = claim(data + TAKEN)
        while item < items:
            for token in range(item * together, min(item * together + together, tokens)):
                _rope_store(at, data, token, size)
            item = claim(data + TAKEN)

    return compiled(rope_store)


@part
def _rope_store(head: int, data: int, token: int, size: int) -> None:
    query, keys, values = integer_at(data + 96), integer_at(data + 104), integer_at(data + 112)
    heads, groups, half = integer_at(data + 128), integer_at(data + 136), size // 2
    turned, cosine, sine = head + _bytes_of(size), head + 2 * _bytes_of(size), head + 3 * _bytes_of(size)
    for pair in range(half):
        put_number(cosine + pair * 4, number_at(integer_at(data + 72) + (token * half + pair) * 4))
        put_number(sine + pair * 4, number_at(integer_at(data + 80) + (token * half + pair) * 4))
    slot = integer_at(integer_at(data + 88) + token * 8)
    block, offset = slot // PAGE * groups, slot % PAGE
    source = integer_at(data + 40) + token * (heads + 2 * groups) * size * 2
    for one in range(heads + groups):
        weight = integer_at(data + 48) if one < heads else integer_at(data + 56)
        _take(head, source + one * size * 2, weight, number_at(data + 64), size)
        _turn(turned, head, cosine, sine, half)
        if one < heads:
            for place in range(0, size * 2, LANES * 2):
                copy_sixteen(query + (token * heads + one) * size * 2 + place, turned + place)
        else:
            to = keys + (block + one - heads) * PAGE * size * 2 + offset * 4
            for pair in range(half):
                copy_pair(to + pair * PAGE * 4, turned + pair * 4)
    for one in range(groups):
        to = values + ((block + one) * PAGE * size + offset // 2 * 2 * size + offset % 2) * 2
        for column in range(size):
            copy_half(to + column * 4, source + ((heads + groups + one) * size + column) * 2)


@part
def _take(to: int, source: int, weight: int, epsilon: float, size: int) -> None:
    if weight != 0:
        norm_row(source, weight, to, size, epsilon)
    else:
        for place in range(0, size * 2, LANES * 2):
            copy_sixteen(to + place, source + place)


@part
def _turn(to: int, source: int, cosine: int, sine: int, half: int) -> None:
    """Lanes beyond half a head hold what nobody wants; the second half is written over those of the first."""
    for pair in range(0, half, LANES):
        first, second = sixteen_halves_at(source + pair * 2), sixteen_halves_at(source + (half + pair) * 2)
        put_halves(
            to + pair * 2,
            minus(times(first, sixteen_at(cosine + pair * 4)), times(second, sixteen_at(sine + pair * 4))),
        )
    for pair in range(0, half, LANES):
        first, second = sixteen_halves_at(source + pair * 2), sixteen_halves_at(source + (half + pair) * 2)
        put_halves(
            to + (half + pair) * 2,
            plus(times(second, sixteen_at(cosine + pair * 4)), times(first, sixteen_at(sine + pair * 4))),
        )


def verify_invariance(heads: int, groups: int, size: int) -> bool:
    """Return whether a token has the same bits here alone and among others, and those of the plain version."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(7, (heads + 2 * groups) * size, generator=generator).bfloat16()
    angles = torch.rand(7, size // 2, generator=generator) * 100
    cos, sin, slots = angles.cos(), angles.sin(), torch.randperm(3 * PAGE, generator=generator)[:7]
    caches, others, plain = ([torch.zeros(3, PAGE, groups, size).bfloat16() for _ in "kv"] for _ in range(3))
    query = tile_rope_store(qkv, None, cos, sin, slots, *caches)
    for token in range(7):
        row = slice(token, token + 1)
        if not torch.equal(tile_rope_store(qkv[row], None, cos[row], sin[row], slots[row], *others), query[row]):
            return False
    turned, value = torch.split(qkv.view(7, -1, size), [heads + groups, groups], dim=1)
    turned = rope(turned, cos, sin)
    store_kv(turned[:, heads:], value, plain[0], plain[1], slots)
    expected = ((query, turned[:, :heads]), *zip((*caches, *caches), (*others, *as_tiles(*plain)), strict=True))
    return all(torch.equal(found, right) for found, right in expected)
