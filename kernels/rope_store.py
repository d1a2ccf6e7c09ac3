"""Rotary positions, and keys and values stored into their slots of the paged cache.

Numeric contract: elementwise in float32, rounded once; a token's bits depend on it and its position alone. A cache may
hold float8, see float8.py: what it would hold in the model's dtype is then rounded once more. On a GPU the norm of each
head's query and key (Qwen3), the rotation and the store are one launch, `rope_store`: a program takes one token and
eight heads, and rounds wherever the functions one after another would.
Source: Su et al., 2021 (RoPE, in the half-rotated layout of Hugging Face); Kwon et al., 2023 (slots).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.float8 import FLOAT8, check_caches, stored, to_float8
from kernels.jit import INTERPRETED, Pointer, jit, narrow, tl
from kernels.launch import device_of, launch_for, power_of_two
from kernels.rms_norm import rms_norm
from kernels.shape import ShapeError, check_shape


def rope(
    x: Tensor,  # [T, H, D]  D even
    cos: Tensor,  # [T, D/2] float32, of each token's position
    sin: Tensor,  # [T, D/2] float32
) -> Tensor:  # [T, H, D]
    """Return x with each pair (d, d + D/2) rotated by its position's angle.

    Raises:
        ShapeError: the shapes disagree.
    """
    tokens, _, size = x.shape
    if size % 2:
        raise ShapeError(f"the head size {size} is odd")
    check_shape("cos", cos, tokens, size // 2)
    check_shape("sin", sin, tokens, size // 2)
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def store_kv(
    key: Tensor,  # [T, G, D]
    value: Tensor,  # [T, G, D]
    key_cache: Tensor,  # [N, P, G, D]  changed in place; same dtype, or float8
    value_cache: Tensor,  # [N, P, G, D]
    slots: Tensor,  # [T] int64  block · P + offset; no slot twice
) -> None:
    """Write each token's key and value into its slot.

    Raises:
        ShapeError: the shapes or the dtypes disagree.
    """
    check_shape("value", value, *key.shape)
    check_shape("slots", slots, key.shape[0])
    check_shape("value_cache", value_cache, *key_cache.shape)
    if key_cache.shape[2:] != key.shape[1:]:
        raise ShapeError(f"`key_cache` {list(key_cache.shape)} does not hold heads {list(key.shape[1:])}")
    check_caches(key.dtype, key_cache, value_cache)
    for cache, given in ((key_cache, key), (value_cache, value)):
        rows, written = cache.view(-1, *key.shape[1:]), given
        if cache.dtype == FLOAT8:  # bytes go everywhere that numbers of eight bits do not
            rows, written = rows.view(torch.uint8), to_float8(given).view(torch.uint8)
        rows[slots] = written


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """The norm of every query's and key's head."""

    query: Tensor  # [D]
    key: Tensor  # [D]
    epsilon: float


def rope_store(
    qkv: Tensor,  # [T, (H + 2G) · D]  the heads of the query, of the key, of the value
    norm: HeadNorm | None,
    cos: Tensor,  # [L, D/2] float32, of every position
    sin: Tensor,  # [L, D/2] float32
    positions: Tensor,  # [T] int64, < L
    slots: Tensor,  # [T] int64  block · P + offset; no slot twice
    key_cache: Tensor,  # [N, P, G, D]  changed in place; same dtype, or float8
    value_cache: Tensor,  # [N, P, G, D]
) -> Tensor:  # [T, H, D]
    """Return the query, normed and rotated; the key, treated alike, and the value go into their slots.

    Raises:
        ShapeError: the shapes or the dtypes disagree.

    Cost: one pass over `qkv`; bound by memory bandwidth.
    """
    tokens, (groups, size) = qkv.shape[0], key_cache.shape[2:]
    heads = qkv.shape[1] // size - 2 * groups
    if heads < 1 or qkv.shape[1] % size or size % 2:
        raise ShapeError(f"`qkv` {list(qkv.shape)} does not hold a query, key and value for {groups} heads of {size}")
    for name, tensor in (("positions", positions), ("slots", slots)):
        check_shape(name, tensor, tokens)
    check_shape("value_cache", value_cache, *key_cache.shape)
    check_shape("cos", cos, cos.shape[0], size // 2)
    check_shape("sin", sin, *cos.shape)
    if norm is not None:
        check_shape("norm.query", norm.query, size)
        check_shape("norm.key", norm.key, size)
    check_caches(qkv.dtype, key_cache, value_cache)
    if qkv.is_cuda:
        return rope_store_triton(qkv, norm, cos, sin, positions, slots, key_cache, value_cache)
    query, key, value = torch.split(qkv.view(tokens, -1, size), [heads, groups, groups], dim=1)
    if norm is not None:
        query, key = rms_norm(query, norm.query, norm.epsilon), rms_norm(key, norm.key, norm.epsilon)
    cos, sin = cos[positions], sin[positions]
    store_kv(rope(key, cos, sin), value, key_cache, value_cache, slots)
    return rope(query, cos, sin)


def rope_store_triton(
    qkv: Tensor,
    norm: HeadNorm | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Return `rope_store` by the kernel.

    Raises:
        ShapeError: a cache is not contiguous.
    """
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if not cache.is_contiguous():
            raise ShapeError(f"`{name}` is not contiguous")
    tokens, (groups, size) = qkv.shape[0], key_cache.shape[2:]
    heads = qkv.shape[1] // size - 2 * groups
    query = qkv.new_empty(tokens, heads, size)
    launch = launch_for("rope_store", size, device_of(qkv))
    _rope_store_kernel[(tokens, -(-(heads + 2 * groups) // launch.block_m))](
        qkv.contiguous(),
        None if norm is None else norm.query.contiguous(),
        None if norm is None else norm.key.contiguous(),
        0.0 if norm is None else norm.epsilon,
        cos.contiguous(),
        sin.contiguous(),
        positions.contiguous(),
        slots.contiguous(),
        query,
        key_cache,
        value_cache,
        HEADS=heads,
        GROUPS=groups,
        HALF=size // 2,
        BLOCK=power_of_two(size // 2),
        ROWS=launch.block_m,
        PLAIN=INTERPRETED,
        **launch.options,
    )
    return query


@jit
def _rope_store_kernel(
    qkv: Pointer,  # [tokens, (HEADS + 2 · GROUPS) · 2 · HALF]
    query_norm: Pointer,  # [2 · HALF], or None
    key_norm: Pointer,  # [2 · HALF], or None
    epsilon: float,
    cos: Pointer,  # [L, HALF] float32
    sin: Pointer,  # [L, HALF] float32
    positions: Pointer,  # [tokens]
    slots: Pointer,  # [tokens]
    query: Pointer,  # [tokens, HEADS, 2 · HALF]
    key_cache: Pointer,  # [slots, GROUPS, 2 · HALF]
    value_cache: Pointer,  # [slots, GROUPS, 2 · HALF]
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]  # the heads of query, key, value, counted on
    pair = tl.arange(0, BLOCK)[None, :]  # (pair, pair + HALF) are turned together
    inside = (head < HEADS + 2 * GROUPS) & (pair < HALF)
    of_query, of_value = head < HEADS, head >= HEADS + GROUPS
    dtype: tl.constexpr = query.dtype.element_ty
    of_cache: tl.constexpr = key_cache.dtype.element_ty

    read = qkv + (token * (HEADS + 2 * GROUPS) + head) * 2 * HALF + pair
    first = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + HALF, mask=inside, other=0.0).to(tl.float32)
    value_first, value_second = first, second
    if query_norm is not None:
        squares = tl.sum(first * first + second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + epsilon)[:, None]
        weight = tl.where(of_query, query_norm + pair, key_norm + pair)
        weight_first = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
        weight_second = tl.load(weight + HALF, mask=inside, other=0.0).to(tl.float32)
        first = narrow(first * scale, dtype, PLAIN).to(tl.float32) * weight_first
        second = narrow(second * scale, dtype, PLAIN).to(tl.float32) * weight_second
        first = narrow(first, dtype, PLAIN).to(tl.float32)
        second = narrow(second, dtype, PLAIN).to(tl.float32)

    angle = tl.load(positions + token).to(tl.int64) * HALF + pair
    cosine = tl.load(cos + angle, mask=pair < HALF, other=0.0)
    sine = tl.load(sin + angle, mask=pair < HALF, other=0.0)
    turned_first = narrow(first * cosine - second * sine, dtype, PLAIN)
    turned_second = narrow(second * cosine + first * sine, dtype, PLAIN)

    write = query + (token * HEADS + head) * 2 * HALF + pair
    tl.store(write, turned_first, mask=inside & of_query)
    tl.store(write + HALF, turned_second, mask=inside & of_query)
    slot = tl.load(slots + token).to(tl.int64)
    write = key_cache + (slot * GROUPS + head - HEADS) * 2 * HALF + pair
    of_key = inside & (head >= HEADS) & (head < HEADS + GROUPS)
    tl.store(write, stored(turned_first, of_cache, PLAIN), mask=of_key)
    tl.store(write + HALF, stored(turned_second, of_cache, PLAIN), mask=of_key)
    write = value_cache + (slot * GROUPS + head - HEADS - GROUPS) * 2 * HALF + pair
    tl.store(write, stored(narrow(value_first, dtype, PLAIN), of_cache, PLAIN), mask=inside & of_value)
    tl.store(write + HALF, stored(narrow(value_second, dtype, PLAIN), of_cache, PLAIN), mask=inside & of_value)


def rope_reference(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Return the same by complex multiplication in float64."""
    angles = positions.double()[:, None] * inverse_frequencies.double()
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
