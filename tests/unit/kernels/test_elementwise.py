"""RMSNorm, RoPE with its store, and SiLU · up: each equals its slow version, row by row, and refuses what disagrees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from kernels.rope_store import HeadNorm, rope, rope_reference, rope_store, store_kv
from kernels.shape import ShapeError
from kernels.silu_mul import silu_mul, silu_mul_reference
from tests.support.fresh import drawn

WIDTHS = [1, 3, 64, 173, 896]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).mul(2).bfloat16()


def angles(positions: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inverse = 1.0 / 10_000 ** (torch.arange(0, size, 2).float() / size)
    turned = positions[:, None].float() * inverse
    return turned.cos(), turned.sin(), inverse


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_equals_the_reference_between_poison(width: int, generator: torch.Generator) -> None:
    x, weight = drawn(generator, 37, width), drawn(generator, width)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), atol=1e-3, rtol=0.02)


def test_adding_first_is_adding_and_norming() -> None:
    x, residual, weight = draw(5, 64), draw(5, 64) + 1, draw(64)
    normed, added = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(added, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, 1e-6))


def test_a_row_of_zeros_stays_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8).bfloat16(), draw(8), 1e-6), torch.zeros(2, 8).bfloat16())


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul_equals_the_reference_between_poison(width: int, generator: torch.Generator) -> None:
    x = drawn(generator, 37, 2 * width)
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x), atol=1e-3, rtol=0.02)


@pytest.mark.parametrize("size", [2, 10, 64, 128])
def test_rope_equals_complex_multiplication_between_poison(size: int, generator: torch.Generator) -> None:
    x, positions = drawn(generator, 9, 3, size), torch.tensor([0, 1, 2, 15, 16, 255, 256, 700, 1023])
    cos, sin, inverse = angles(positions, size)
    torch.testing.assert_close(rope(x, cos, sin), rope_reference(x, positions, inverse), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("width", [3, 173, 688, 1030])
@pytest.mark.parametrize("name", ["norm", "silu"])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(name: str, width: int) -> None:
    weight = draw(width)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "norm": lambda x: rms_norm(x[:, :width].contiguous(), weight, 1e-6),
        "silu": silu_mul,
    }
    x = draw(600, 2 * width)
    whole = functions[name](x)
    for rows in (1, 2, 3, 17, 32, 257):
        for offset in (0, 1, 301):
            part = slice(offset, offset + rows)
            assert torch.equal(functions[name](x[part].clone()), whole[part])


def test_what_is_stored_lies_in_its_slot_and_nowhere_else() -> None:
    key, value = draw(3, 2, 8), draw(3, 2, 8) + 1
    keys, values = torch.zeros(4, 16, 2, 8).bfloat16(), torch.zeros(4, 16, 2, 8).bfloat16()
    slots = torch.tensor([17, 63, 0])
    store_kv(key, value, keys, values, slots)
    for cache, stored in ((keys, key), (values, value)):
        flat = cache.view(-1, 2, 8)
        assert torch.equal(flat[slots], stored)
        assert int((flat != 0).any(-1).any(-1).sum()) == 3


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_rope_store_is_its_parts_one_after_another(normed: bool) -> None:
    qkv, weights = draw(3, 8 * 10), (draw(10), draw(10) + 1)
    cos, sin, _ = angles(torch.arange(9), 10)
    positions, slots = torch.tensor([8, 0, 5]), torch.tensor([17, 63, 0])
    whole, parts = ([torch.zeros(4, 16, 2, 10).bfloat16() for _ in "kv"] for _ in range(2))
    out = rope_store(qkv, HeadNorm(*weights, 1e-6) if normed else None, cos, sin, positions, slots, *whole)
    query, key, value = torch.split(qkv.view(3, 8, 10), [4, 2, 2], dim=1)
    if normed:
        query, key = rms_norm(query, weights[0], 1e-6), rms_norm(key, weights[1], 1e-6)
    store_kv(rope(key, cos[positions], sin[positions]), value, *parts, slots)
    assert torch.equal(out, rope(query, cos[positions], sin[positions]))
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_disagreeing_arguments_are_refused() -> None:
    x, cache = draw(3, 2, 8), torch.zeros(4, 16, 2, 8).bfloat16()
    cos, at = torch.zeros(3, 4), torch.arange(3)
    norm = HeadNorm(draw(8), draw(7), 1e-6)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("weight", lambda: rms_norm(draw(2, 8), draw(7), 1e-6)),
        ("residual", lambda: add_rms_norm(draw(2, 8), draw(3, 8), draw(8), 1e-6)),
        ("gate_up", lambda: silu_mul(draw(2, 7))),
        ("gate_up", lambda: silu_mul(draw(8))),
        ("odd", lambda: rope(draw(3, 2, 7), cos, cos)),
        ("cos", lambda: rope(x, cos[:2], cos)),
        ("sin", lambda: rope(x, cos, cos[:, :2])),
        ("value", lambda: store_kv(x, x[:2], cache, cache, torch.arange(3))),
        ("slots", lambda: store_kv(x, x, cache, cache, torch.arange(2))),
        ("value_cache", lambda: store_kv(x, x, cache, cache[1:], torch.arange(3))),
        ("key_cache", lambda: store_kv(x[:, :1], x[:, :1], cache, cache, torch.arange(3))),
        ("qkv", lambda: rope_store(draw(3, 8 * 4), None, cos, cos, at, at, cache, cache)),
        ("qkv", lambda: rope_store(draw(3, 8 * 5 + 1), None, cos, cos, at, at, cache, cache)),
        ("positions", lambda: rope_store(draw(3, 8 * 5), None, cos, cos, at[:2], at, cache, cache)),
        ("slots", lambda: rope_store(draw(3, 8 * 5), None, cos, cos, at, at[:2], cache, cache)),
        ("value_cache", lambda: rope_store(draw(3, 8 * 5), None, cos, cos, at, at, cache, cache[1:])),
        ("cos", lambda: rope_store(draw(3, 8 * 5), None, cos[:, :3], cos, at, at, cache, cache)),
        ("sin", lambda: rope_store(draw(3, 8 * 5), None, cos, cos[:2], at, at, cache, cache)),
        ("norm.key", lambda: rope_store(draw(3, 8 * 5), norm, cos, cos, at, at, cache, cache)),
    ]
    for name, call in refused:
        with pytest.raises(ShapeError, match=name):
            call()
