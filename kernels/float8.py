"""Eight bits for a key or a value: how one is rounded to them for the cache, and widened again for attention.

Numeric contract. A sign, four bits of exponent, three of mantissa, no infinity: 2⁻⁹ … 448. What has been rounded to the
model's own dtype is rounded once more, to the nearest, ties to even; beyond ±448 it becomes ±448, infinities too; what
is not a number becomes the byte 0x7F; a zero keeps its sign. The scale is static, and 1: every value is stored as it
is, whatever stands beside it. Widening is exact in bfloat16 and float16, so that attention computes as it would on a
cache of those. A row's own key is read from the cache as well, never from before it was rounded: prefill == decode.

The library's cast is asked for numbers within ±448 alone: beyond them its versions disagree. Triton's compiler gives
the instructions of sm_89 and later, which round as above; its interpreter cuts off instead of rounding and knows no
NaN, so that where it walks the bits are computed. On a CPU half the memory is paid with time.

Source: OCP 8-bit Floating Point Specification, 2023 (E4M3); Micikevicius et al., 2022.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.jit import Block, jit, tl
from kernels.shape import ShapeError

FLOAT8 = torch.float8_e4m3fn
GREATEST = 448.0
NOT_A_NUMBER = 0x7F
LEAST_CAPABILITY = (8, 9)  # of a GPU whose instructions these are


def check_caches(dtype: torch.dtype, key_cache: Tensor, value_cache: Tensor) -> None:
    """Raise ShapeError unless both caches hold `dtype`, that of the model, or both float8."""
    if key_cache.dtype not in (dtype, FLOAT8):
        raise ShapeError(f"`key_cache` holds {key_cache.dtype}, neither {dtype} nor {FLOAT8}")
    if value_cache.dtype != key_cache.dtype:
        raise ShapeError(f"`value_cache` holds {value_cache.dtype}, and `key_cache` {key_cache.dtype}")


def runs_on(device: torch.device) -> bool:
    """Return whether kernels can read and write float8 on a device."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def to_float8(x: Tensor) -> Tensor:
    """Return x rounded to float8."""
    rounded = x.float().clamp(-GREATEST, GREATEST).to(FLOAT8)
    return rounded.view(torch.uint8).masked_fill(x.isnan(), NOT_A_NUMBER).view(FLOAT8)


def from_float8(
    x: Tensor,  # [...] float8, on a CPU, contiguous, an even number of elements
    dtype: torch.dtype,  # bfloat16 or float16
) -> Tensor:  # [...]
    """Return x widened. Two at a time by a table: the library's cast takes several times as long."""
    pairs = x.view(torch.uint8).view(-1).view(torch.int16).int().bitwise_and_(0xFFFF)
    return _pairs(dtype).index_select(0, pairs).view(dtype).view(x.shape)


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """Return two elements of `dtype`, in the bits of one int32, for every two of float8."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(FLOAT8)
    return every.to(dtype).view(torch.int32)


@jit
def stored(x: Block, dtype: tl.constexpr, PLAIN: tl.constexpr) -> Block:
    """Return what a cache of `dtype` holds of x, which has the model's; `PLAIN` where the interpreter walks."""
    if dtype == tl.float8e4nv:
        x = x.to(tl.float32)
        if PLAIN:
            x = _nearest_byte(x)
            x = x.to(dtype, bitcast=True)
        else:
            x = x.to(dtype)
    return x


@jit
def _nearest_byte(x: Block) -> Block:
    """Return the byte that float32 x is rounded to."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    # Below 2⁻⁶ the last place is 2⁻⁹, as it is of numbers about 2¹⁴: added to one, the sum is rounded there.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    large = (size + 0x7FFFF + ((size >> 20) & 1) - 0x3C000000) >> 20
    size = tl.where(size < 0x3C800000, small, large)
    return tl.where(x == x, size | ((bits >> 24) & 0x80), 0x7F).to(tl.uint8)


@jit
def widened(x: Block, dtype: tl.constexpr, PLAIN: tl.constexpr) -> Block:
    """Return what was read of a cache in `dtype`, the model's; `PLAIN` where the interpreter walks."""
    if x.dtype == tl.float8e4nv:
        if PLAIN:
            x = _value_of(x.to(tl.uint8, bitcast=True).to(tl.uint32))
        x = x.to(dtype)
    return x


@jit
def _value_of(byte: Block) -> Block:
    """Return the float32 that a byte stands for."""
    size = ((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰, between the exponents
    bits = tl.where((byte & 0x7F) == 0x7F, 0x7FC00000, size.to(tl.uint32, bitcast=True))
    return (bits | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)


def to_float8_reference(x: Tensor) -> Tensor:
    """Return the same by looking for the nearest of all values, in float64."""
    values = torch.arange(NOT_A_NUMBER, dtype=torch.uint8).view(FLOAT8).double()
    size = x.double().abs().nan_to_num(0.0).clamp(max=GREATEST)
    above = torch.searchsorted(values, size).clamp(max=NOT_A_NUMBER - 1)
    below = (above - 1).clamp(min=0)
    to_below, to_above = size - values[below], values[above] - size
    nearer = torch.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    byte = torch.where(x.isnan(), NOT_A_NUMBER, nearer + 128 * x.signbit().long() * x.isnan().logical_not())
    return byte.to(torch.uint8).view(FLOAT8)
