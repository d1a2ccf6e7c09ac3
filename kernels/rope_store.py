"""Rotary positions, and keys and values stored into their slots of the paged cache.

Numeric contract: elementwise in float32, rounded once; a token's bits depend on it and its position alone.
Source: Su et al., 2021 (RoPE, in the half-rotated layout of Hugging Face); Kwon et al., 2023 (slots).
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    key_cache: Tensor,  # [N, P, G, D]  changed in place
    value_cache: Tensor,  # [N, P, G, D]
    slots: Tensor,  # [T] int64  block · P + offset; no slot twice
) -> None:
    """Write each token's key and value into its slot.

    Raises:
        ShapeError: the shapes disagree.
    """
    check_shape("value", value, *key.shape)
    check_shape("slots", slots, key.shape[0])
    check_shape("value_cache", value_cache, *key_cache.shape)
    if key_cache.shape[2:] != key.shape[1:]:
        raise ShapeError(f"`key_cache` {list(key_cache.shape)} does not hold heads {list(key.shape[1:])}")
    key_cache.view(-1, *key.shape[1:])[slots] = key
    value_cache.view(-1, *value.shape[1:])[slots] = value


def rope_reference(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Return the same by complex multiplication in float64."""
    angles = positions.double()[:, None] * inverse_frequencies.double()
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
