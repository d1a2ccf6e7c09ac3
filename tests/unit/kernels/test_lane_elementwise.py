"""Compiled norms, gates and rotations: each equals its plain version within a rounding, row by row in bits."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from kernels.rope_store import HeadNorm, rope, store_kv
from kernels.shape import ShapeError
from kernels.silu_mul import silu_mul, silu_mul_reference
from tests.support.poison import among_nan

pytest.importorskip("numba")

from kernels import lane_rms_norm as norms
from kernels import lane_silu_mul as gates
from kernels.lane_rms_norm import lane_add_rms_norm, lane_rms_norm
from kernels.lane_silu_mul import lane_silu_mul
from kernels.tile_attention import PAGE, from_tiles
from kernels.tile_rope_store import tile_rope_store

WIDTHS = [16, 48, 256, 896]
GATES = [16, 17, 31, 173, 688]


def draw(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).mul(scale).bfloat16()


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_equals_the_reference(width: int) -> None:
    x, weight = draw(37, width), draw(width)
    out = lane_rms_norm(among_nan(x), among_nan(weight), 1e-6)
    torch.testing.assert_close(out, rms_norm_reference(x, weight, 1e-6), atol=1e-3, rtol=0.02)
    assert float((out != rms_norm(x, weight, 1e-6)).float().mean()) < 0.01


@pytest.mark.parametrize("width", WIDTHS)
def test_adding_first_is_adding_and_norming(width: int) -> None:
    x, residual, weight = draw(5, width), draw(5, width) + 1, draw(width)
    normed, added = lane_add_rms_norm(among_nan(x), among_nan(residual), weight, 1e-6)
    assert torch.equal(added, add_rms_norm(x, residual, weight, 1e-6)[1])
    assert torch.equal(normed, lane_rms_norm(added, weight, 1e-6))


def test_a_row_of_zeros_stays_finite() -> None:
    assert torch.equal(lane_rms_norm(torch.zeros(2, 16).bfloat16(), draw(16), 1e-6), torch.zeros(2, 16).bfloat16())


@pytest.mark.parametrize("width", GATES)
def test_silu_mul_equals_the_reference(width: int) -> None:
    x = draw(37, 2 * width)
    out = lane_silu_mul(among_nan(x))
    torch.testing.assert_close(out, silu_mul_reference(x), atol=1e-3, rtol=0.02)
    assert float((out != silu_mul(x)).float().mean()) < 0.01


def test_gates_far_from_zero_close_or_open() -> None:
    gate = torch.tensor([-3e38, -1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 3e38] * 2).bfloat16()
    out = lane_silu_mul(torch.cat((gate, torch.ones(16).bfloat16()))[None])
    torch.testing.assert_close(out[0], gate.relu(), atol=1e-30, rtol=0)
    assert bool(lane_silu_mul(torch.full((1, 32), torch.nan).bfloat16()).isnan().all())


@pytest.mark.parametrize("width", [*WIDTHS, *GATES])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(width: int) -> None:
    x, weight = draw(33, 2 * width), draw(2 * width)
    for operation in (lane_silu_mul, lambda rows: lane_rms_norm(rows, weight, 1e-6)):
        if operation is not lane_silu_mul and not norms.takes(2 * width):
            continue
        whole = operation(x)
        for start, end in ((0, 1), (5, 7), (32, 33), (3, 20)):
            assert torch.equal(operation(x[start:end]), whole[start:end])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (8, 4, 32), (3, 1, 48), (2, 2, 80), (2, 1, 128)])
def test_rotating_and_storing_is_that_of_the_plain_version(heads: int, groups: int, size: int, normed: bool) -> None:
    tokens, blocks = 21, 5
    qkv = draw(tokens, (heads + 2 * groups) * size)
    angles = torch.rand(tokens, size // 2, generator=torch.Generator().manual_seed(1)) * 1000
    cos, sin = angles.cos(), angles.sin()
    norm = HeadNorm(draw(size), draw(size, scale=1.5), 1e-6) if normed else None
    slots = torch.randperm(blocks * PAGE, generator=torch.Generator().manual_seed(2))[:tokens]
    caches = [torch.full((blocks, PAGE, groups, size), torch.nan).bfloat16() for _ in "kv"]
    expected, again = ([cache.clone() for cache in caches] for _ in range(2))

    query = tile_rope_store(among_nan(qkv), norm, among_nan(cos), among_nan(sin), slots, *caches)
    other, key, value = torch.split(qkv.view(tokens, -1, size), [heads, groups, groups], dim=1)
    if norm is not None:
        other, key = rms_norm(other, norm.query, 1e-6), rms_norm(key, norm.key, 1e-6)
    store_kv(rope(key, cos, sin), value, *expected, slots)

    tolerance = {"atol": 0.02, "rtol": 0.02} if normed else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(query, rope(other, cos, sin), **tolerance)
    keys, values = from_tiles(*caches)
    torch.testing.assert_close(keys, expected[0], equal_nan=True, **tolerance)  # and nothing else is written
    torch.testing.assert_close(values, expected[1], equal_nan=True, atol=0, rtol=0)

    for token in range(tokens):
        row = slice(token, token + 1)
        alone = tile_rope_store(qkv[row], norm, cos[row], sin[row], slots[row], *again)
        assert torch.equal(alone, query[row])
    for found, cache in zip(again, caches, strict=True):
        assert torch.equal(found.view(torch.int16), cache.view(torch.int16))


@pytest.mark.parametrize("width", WIDTHS)
def test_this_machine_keeps_rows_apart(width: int) -> None:
    assert norms.verify_invariance(width)
    assert gates.verify_invariance(width + 5)


def test_widths_that_are_not_computed_here_are_named() -> None:
    for module in (norms, gates):
        assert module.takes(16)
        assert not any(module.takes(width) for width in (0, 8, 15))
    assert not any(norms.takes(width) for width in (17, 40))


def test_disagreeing_arguments_are_refused() -> None:
    with pytest.raises(ShapeError, match="a multiple of 16"):
        lane_rms_norm(draw(2, 40), draw(40), 1e-6)
    with pytest.raises(ShapeError, match="weight"):
        lane_rms_norm(draw(2, 32), draw(16), 1e-6)
    with pytest.raises(ShapeError, match="residual"):
        lane_add_rms_norm(draw(2, 32), draw(1, 32), draw(32), 1e-6)
    with pytest.raises(ShapeError, match="x"):
        lane_rms_norm(draw(32, 32).T, draw(32), 1e-6)
    for shape in ((2, 33), (2, 30)):
        with pytest.raises(ShapeError, match="gate_up"):
            lane_silu_mul(draw(*shape))
    caches = [draw(2, PAGE, 1, 16) for _ in "kv"]
    angles, slots = torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)
    for qkv, cos, places in (
        (draw(2, 32), angles, slots),
        (draw(2, 48), angles[:1], slots),
        (draw(2, 48), angles, slots[:1]),
        (draw(2, 48), angles.double(), slots),
    ):
        with pytest.raises(ShapeError):
            tile_rope_store(qkv, None, cos, cos, places, *caches)
    with pytest.raises(ShapeError, match=r"norm\.key"):
        tile_rope_store(draw(2, 48), HeadNorm(draw(16), draw(8), 1e-6), angles, angles, slots, *caches)
