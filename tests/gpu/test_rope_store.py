"""Norm of the heads, rotation and store in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.jit import INTERPRETED
from kernels.rms_norm import rms_norm_reference
from kernels.rope_store import HeadNorm, rope_reference, rope_store_triton
from tests.support.batches import DTYPE, MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan

TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
PAGE, BLOCKS, MOST = 4, 700, 3000  # tokens of a block, blocks of the cache, positions of the table


@dataclass(frozen=True, slots=True)
class World:
    """Tokens with their positions and slots, and angles between NaN."""

    heads: int
    groups: int
    size: int
    qkv: Tensor
    norm: HeadNorm | None
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    inverse: Tensor

    def run(self, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query, and caches that were NaN before."""
        shape = (BLOCKS, PAGE, self.groups, self.size)
        caches = [torch.full(shape, torch.nan, dtype=self.qkv.dtype, device=self.qkv.device) for _ in "kv"]
        tables = (self.cos, self.sin, self.positions[part], self.slots[part])
        return rope_store_triton(among_nan(self.qkv[part]), self.norm, *tables, *caches), *caches

    def rows(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, keys and values token by token."""
        query, *caches = self.run(part)
        keys, values = (cache.view(-1, self.groups, self.size)[self.slots[part]] for cache in caches)
        return query, keys, values


def draw(
    tokens: int,
    layout: tuple[int, int, int],
    normed: bool,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> World:
    heads, groups, size = layout
    qkv = among_nan(torch.randn(tokens, (heads + 2 * groups) * size, generator=generator).to(device, dtype))
    weights = [among_nan(torch.randn(size, generator=generator).to(device, dtype)) for _ in "qk"]
    inverse = 1.0 / 10_000 ** (torch.arange(0, size, 2).double() / size)
    angles = torch.arange(MOST)[:, None].double() * inverse
    return World(
        *layout,
        qkv,
        HeadNorm(*weights, 1e-6) if normed else None,
        among_nan(angles.cos().float().to(device)),
        among_nan(angles.sin().float().to(device)),
        torch.randint(0, MOST, (tokens,), generator=generator).to(device),
        torch.randperm(PAGE * BLOCKS, generator=generator)[:tokens].to(device),
        inverse.to(device),
    )


LAYOUTS = [(1, 1, 2), (4, 2, 10), (7, 1, 64), (14, 2, 80), (16, 8, 128), (2, 1, 256)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_query_and_caches_equal_the_reference_and_nothing_else_is_written(
    layout: tuple[int, int, int], normed: bool, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    world = draw(9, layout, normed, dtype, device, generator)
    out, keys, values = world.run()
    split = [world.heads, world.groups, world.groups]
    query, key, value = world.qkv.view(9, -1, world.size).split(split, dim=1)
    if world.norm is not None:
        query = rms_norm_reference(query, world.norm.query, world.norm.epsilon)
        key = rms_norm_reference(key, world.norm.key, world.norm.epsilon)
    expected = [rope_reference(x, world.positions, world.inverse) for x in (query, key)]
    rows = [cache.view(-1, world.groups, world.size) for cache in (keys, values)]
    # What the norm rounds may fall on the other side and is turned then: an error of the greatest, not of each.
    greatest = float(world.qkv.abs().max()) * 4
    torch.testing.assert_close(out, expected[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * greatest)
    torch.testing.assert_close(
        rows[0][world.slots], expected[1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * greatest
    )
    assert torch.equal(rows[1][world.slots], value)
    for cache in rows:
        assert int(cache.isnan().logical_not().any(-1).any(-1).sum()) == 9


def test_position_zero_turns_nothing(device: torch.device, generator: torch.Generator) -> None:
    world = draw(5, (3, 1, 16), False, torch.bfloat16, device, generator)
    world.positions.zero_()
    out, keys, _ = world.run()
    assert torch.equal(out, world.qkv.view(5, 5, 16)[:, :3])
    assert torch.equal(keys.view(-1, 1, 16)[world.slots], world.qkv.view(5, 5, 16)[:, 3:4])


@pytest.mark.parametrize(
    ("layout", "normed", "tokens"),
    [((1, 1, 2), False, MOST_ROWS), ((7, 2, 10), True, 20 if INTERPRETED else MOST_ROWS)],
    ids=str,
)
def test_the_bits_of_a_token_do_not_depend_on_its_neighbours(
    layout: tuple[int, int, int], normed: bool, tokens: int, device: torch.device, generator: torch.Generator
) -> None:
    world = draw(tokens, layout, normed, DTYPE, device, generator)
    assert_rows_are_their_own(world.rows, tokens)
    assert world.run(slice(0))[0].shape == (0, world.heads, world.size)
