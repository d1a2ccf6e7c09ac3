"""Keys and values of eight bits on a CPU: the bytes that are stored, and attention on them as if they were wider."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_plan import SEGMENT, plan_attention
from kernels.attention_state import FULL, check_attention
from kernels.float8 import FLOAT8, from_float8, to_float8, to_float8_reference
from kernels.paged_attention import SEGMENTS, Segment, paged_attention, paged_attention_reference, soft_capped
from kernels.rope_store import rope_store, store_kv
from kernels.shape import ShapeError

PAGE = 16
UGLY = [  # a number, its byte
    (0.0, 0x00),
    (-0.0, 0x80),
    (2.0**-9, 0x01),  # the least
    (2.0**-10, 0x00),  # half of it: to even
    (-(2.0**-10), 0x80),
    (2.0**-10 * (1 + 2**-7), 0x01),
    (3 * 2.0**-10, 0x02),
    (7 * 2.0**-9, 0x07),  # the greatest subnormal
    (15 * 2.0**-10, 0x08),  # between it and the least normal
    (2.0**-6, 0x08),
    (1.0, 0x38),
    (1.0625, 0x38),  # half a place above: to even
    (1.1875, 0x3A),
    (-1.1875, 0xBA),
    (1.9375, 0x40),  # carries into the exponent
    (432.0, 0x7E),
    (448.0, 0x7E),
    (463.0, 0x7E),
    (464.0, 0x7E),
    (480.0, 0x7E),
    (1e30, 0x7E),
    (-448.0, 0xFE),
    (-1e30, 0xFE),
    (float("inf"), 0x7E),
    (-float("inf"), 0xFE),
    (float("nan"), 0x7F),
    (-float("nan"), 0x7F),
]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize(("number", "byte"), UGLY)
def test_an_ugly_number_has_this_byte(number: float, byte: int) -> None:
    for x in (torch.tensor([number]), torch.tensor([number] * 67).bfloat16()):
        assert set(bits(to_float8(x)).tolist()) == {byte}
        assert set(bits(to_float8_reference(x)).tolist()) == {byte}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_sixteen_bits_becomes_the_nearest_of_eight(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(bits(to_float8(every)), bits(to_float8_reference(every)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_and_rounding_again_gives_every_byte_back(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(2, 128).view(FLOAT8)
    wide = from_float8(every, dtype)
    torch.testing.assert_close(wide.double(), every.double(), rtol=0, atol=0, equal_nan=True)
    expected = bits(every).clone()
    expected[1, 127] = 0x7F  # what is not a number has no sign
    assert torch.equal(bits(to_float8(wide)), expected)


def test_what_is_stored_is_rounded_and_lies_in_its_slot_and_nowhere_else() -> None:
    drawn = torch.randn(3, 2, 2, 8, generator=torch.Generator().manual_seed(0)).mul(300).bfloat16()
    key, value = drawn.unbind(1)
    caches = [torch.zeros(4, PAGE, 2, 8).to(FLOAT8) for _ in "kv"]
    slots = torch.tensor([17, 63, 0])
    store_kv(key, value, *caches, slots)
    for cache, given in zip(caches, (key, value), strict=True):
        rows = cache.view(-1, 2, 8)
        assert torch.equal(bits(rows[slots]), bits(to_float8_reference(given)))
        assert int((rows.float() != 0).any(-1).any(-1).sum()) == 3


def test_rope_store_rounds_what_it_would_store_in_sixteen_bits() -> None:
    qkv = torch.randn(5, 6 * 10, generator=torch.Generator().manual_seed(1)).mul(9).bfloat16()
    angles, at = torch.arange(9)[:, None] / torch.arange(1, 6), torch.tensor([8, 0, 5, 1, 2])
    wide, narrow = ([torch.zeros(1, PAGE, 2, 10).to(dtype) for _ in "kv"] for dtype in (torch.bfloat16, FLOAT8))
    out = rope_store(qkv, None, angles.cos(), angles.sin(), at, at, *wide)
    assert torch.equal(rope_store(qkv, None, angles.cos(), angles.sin(), at, at, *narrow), out)
    for stored, expected in zip(narrow, wide, strict=True):
        assert torch.equal(bits(stored), bits(to_float8_reference(expected)))


@pytest.mark.parametrize("segment", [*SEGMENTS.values(), soft_capped(2.0)], ids=[*SEGMENTS, "capped"])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_is_that_of_the_numbers_stored_to_the_bit(segment: Segment, window: int | None) -> None:
    """In one chunk, in several, and token by token; what nobody wrote is not a number."""
    generator = torch.Generator().manual_seed(2)
    length, blocks = SEGMENT + 70, -(-(SEGMENT + 70) // PAGE)
    caches = [torch.full((blocks + 3, PAGE, 2, 16), torch.nan) for _ in "kv"]
    table = torch.randperm(blocks + 1, generator=generator)[None, :blocks]
    for cache in caches:
        at = torch.arange(length)
        cache[table[0, at // PAGE], at % PAGE] = torch.randn(length, 2, 16, generator=generator).mul(2)
        cache[-1] = 0
    narrow = [to_float8_reference(cache) for cache in caches]
    wide = [cache.bfloat16() for cache in narrow]
    query = torch.randn(length, 6, 16, generator=generator).mul(2).bfloat16()

    def attend(part: slice, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(length)[part]
        zero_slot = (blocks + 2) * PAGE
        plan = plan_attention(table, torch.zeros_like(positions), positions, 6, 2, PAGE, zero_slot, window)
        return paged_attention(query[part], keys, values, plan, 0.25, segment)

    whole = attend(slice(None), *narrow)
    assert torch.equal(whole, attend(slice(None), *wide))
    for part in (slice(0, 1), slice(100, 333), slice(length - 1, length)):
        assert torch.equal(attend(part, *narrow), whole[part])
    if segment is SEGMENTS["fused"]:
        given = (table, torch.zeros(20, dtype=torch.long), torch.arange(length)[-20:], 0.25, window)
        expected = paged_attention_reference(query[-20:], *narrow, *given)
        torch.testing.assert_close(whole[-20:], expected, atol=0.03, rtol=0.03)


def test_a_cache_of_another_dtype_is_refused_by_name() -> None:
    x, at = torch.zeros(3, 2, 8).bfloat16(), torch.arange(3)
    good, bad = torch.zeros(4, PAGE, 2, 8).bfloat16(), torch.zeros(4, PAGE, 2, 8).half()
    small = torch.zeros(4, PAGE, 2, 8).to(FLOAT8)
    angles = torch.zeros(3, 4)
    plan = plan_attention(torch.zeros(1, 1).long(), at * 0, at, 2, 2, PAGE, 0)
    lengths = torch.ones(3, dtype=torch.int32)
    for keys, values, name in ((bad, bad, "key_cache"), (small, good, "value_cache"), (good, small, "value_cache")):
        with pytest.raises(ShapeError, match=name):
            store_kv(x, x, keys, values, at)
        with pytest.raises(ShapeError, match=name):
            rope_store(x.view(3, -1).repeat(1, 3), None, angles, angles, at, at, keys, values)
        with pytest.raises(ShapeError, match=name):
            paged_attention(x, keys, values, plan, 1.0, SEGMENTS["tiled"])
        with pytest.raises(ShapeError, match=name):
            check_attention(x, keys, values, torch.zeros(3, 1), lengths, FULL)
