"""Keys and values of eight bits: the bytes that are stored, and attention that computes as if they were wider."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.attention_state import FULL, AttentionVariant
from kernels.float8 import FLOAT8, runs_on, to_float8_reference
from kernels.jit import INTERPRETED
from kernels.rope_store import HeadNorm, rope_store_triton
from tests.support.paged_world import PAGE, PagedWorld
from tests.support.poison import among_nan, guarded

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
LENGTHS = [1, 17, 65, 270]
LAYOUTS = [  # heads, groups, size of a head
    ((4, 2, 64), BFLOAT16, FULL),
    ((4, 2, 64), BFLOAT16, AttentionVariant(window=100, soft_cap=30.0)),
    ((2, 2, 80), FLOAT16, FULL),
    ((7, 1, 96), BFLOAT16, FULL),
    ((8, 2, 128), FLOAT16, FULL),
    ((16, 1, 256), BFLOAT16, FULL),
    ((3, 1, 10), BFLOAT16, FULL),
]
Layout = tuple[int, int, int]


@pytest.fixture(autouse=True)
def _where_there_is_float8(device: torch.device) -> None:
    if not runs_on(device):
        pytest.skip("this GPU has no instructions for float8")


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def store(qkv: Tensor, groups: int, size: int, norm: HeadNorm | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the bytes of keys and values in caches of `dtype`, token by token; none around them was written."""
    tokens = len(qkv)
    angles = torch.arange(tokens, device=qkv.device)[:, None] / torch.arange(1, size // 2 + 1, device=qkv.device)
    at = torch.randperm(tokens, device=qkv.device)
    blank = torch.full((-(-tokens // PAGE), PAGE, groups, size), torch.nan, device=qkv.device)
    caches = [guarded(blank.to(dtype)) for _ in "kv"]
    rope_store_triton(qkv, norm, angles.cos(), angles.sin(), at, at, *(cache.tensor for cache in caches))
    assert all(cache.untouched for cache in caches)
    keys, values = (bits(cache.tensor.view(-1, groups, size))[at].cpu() for cache in caches)
    return keys, values


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which turns values as well
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_every_number_of_sixteen_bits_is_stored_as_the_nearest_of_eight(
    dtype: torch.dtype, device: torch.device
) -> None:
    """All there are: subnormal ones, those in the middle between two, ±448, beyond, both zeros, and what is none."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(32, 2048)
    qkv = torch.cat((torch.zeros(32, 256 + 2048).to(dtype), every), dim=1).to(device)
    _, values = store(qkv, 8, 256, None, FLOAT8)
    assert torch.equal(values, bits(to_float8_reference(every)).view(32, 8, 256))


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("layout", [(4, 2, 10), (3, 1, 80)], ids=str)
def test_a_key_is_rounded_to_the_dtype_of_the_model_and_then_once_more(
    layout: Layout, normed: bool, device: torch.device, generator: torch.Generator
) -> None:
    heads, groups, size = layout
    drawn = torch.randn(9, (heads + 2 * groups) * size, generator=generator)
    qkv = among_nan(drawn.mul(torch.logspace(-4, 3, 9)[:, None]).to(device, BFLOAT16))
    weights = [torch.randn(size, generator=generator).to(device, BFLOAT16) for _ in "qk"]
    norm = HeadNorm(*weights, 1e-6) if normed else None
    torch.manual_seed(0)
    wide = store(qkv, groups, size, norm, BFLOAT16)
    torch.manual_seed(0)
    narrow = store(qkv, groups, size, norm, FLOAT8)
    for stored, expected in zip(narrow, wide, strict=True):
        assert torch.equal(stored, bits(to_float8_reference(expected.view(BFLOAT16))))


def worlds(
    lengths: list[int],
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    variant: AttentionVariant = FULL,
) -> tuple[PagedWorld, PagedWorld]:
    """Return a world whose cache has eight bits, and the same with those numbers in the dtype of its queries."""
    narrow, wide = (
        PagedWorld(lengths, layout, dtype, device, copy, variant) for copy in (generator, generator.clone_state())
    )
    narrow.keys, narrow.values = (
        among_nan(to_float8_reference(cache.cpu()).to(device)) for cache in (narrow.keys, narrow.values)
    )
    wide.keys, wide.values = (cache.cpu().to(dtype).to(device) for cache in (narrow.keys, narrow.values))
    return narrow, wide


@pytest.mark.parametrize(("layout", "dtype", "variant"), LAYOUTS)
def test_attention_is_that_of_the_numbers_stored_to_the_bit(
    layout: Layout,
    dtype: torch.dtype,
    variant: AttentionVariant,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    narrow, wide = worlds(LENGTHS, layout, dtype, device, generator, variant)
    rows = [(index, length - 1) for index, length in enumerate(LENGTHS)]
    pieces = [(0, 0, 1), (1, 3, 17), (2, 60, 65), (3, 265, 270)]
    decoded, filled = narrow.decode(rows), narrow.prefill(pieces)
    assert torch.equal(decoded, wide.decode(rows))
    assert torch.equal(filled, wide.prefill(pieces))
    assert torch.equal(decoded, filled[[0, 14, 19, 24]])
    tolerance = {BFLOAT16: 0.02, FLOAT16: 0.003}[dtype]
    torch.testing.assert_close(filled, wide.reference(pieces), atol=tolerance, rtol=tolerance)


def test_every_number_of_eight_bits_is_widened_as_it_is(device: torch.device, generator: torch.Generator) -> None:
    """One key alone: its value comes out, whatever its score."""
    narrow, _ = worlds([1] * 8, (1, 1, 32), BFLOAT16, device, generator)
    every = torch.arange(256, dtype=torch.uint8)
    blocks = narrow.table[:, 0].long()
    bits(narrow.values)[blocks, 0, 0] = every.view(8, 32).to(device)
    out = narrow.decode([(index, 0) for index in range(8)]).flatten().cpu()
    expected = every.view(FLOAT8).to(BFLOAT16) + 0.0  # a zero at the end is positive
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_prefill_equals_decode_equals_chunks_in_bits(device: torch.device, generator: torch.Generator) -> None:
    length = 262 if INTERPRETED else 2100
    narrow, _ = worlds([length, 70], (6, 2, 64), BFLOAT16, device, generator)
    first = length - 7
    whole = narrow.prefill([(0, first, length)])
    pieces = [(0, *piece) for piece in itertools.pairwise([*range(first, length, 4), length])]
    assert torch.equal(narrow.prefill([(1, 9, 13), *pieces])[4:], whole)
    assert torch.equal(narrow.decode([(1, 69), *((0, position) for position in range(first, length))])[1:], whole)
