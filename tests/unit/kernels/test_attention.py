from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kernels.attention_plan import ROWS, SEGMENT, plan_attention
from kernels.paged_attention import (
    SEGMENTS,
    Segment,
    merge_state,
    paged_attention,
    segment_tiled,
    soft_capped,
    verify_invariance,
)
from kernels.shape import ShapeError
from tests.support.attention_world import PAGE, World

segments = pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS.keys())


def skip_unless_taken(segment: Segment, groups: int, size: int) -> None:
    if not verify_invariance(segment, groups, size, torch.bfloat16):
        assert segment is not SEGMENTS["tiled"]  # the last resort, which holds everywhere
        pytest.skip("the library is not invariant here for these heads, and the engine would not take it")


def steady(
    tiles: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment attention in which every row is computed alone, as the rows of a tile of its own."""
    count, groups, rows, size = tiles.shape
    alone = tiles.transpose(1, 2).reshape(count * rows, groups, 1, size).expand(-1, -1, ROWS, -1)
    if mask is not None:
        mask = mask.expand(count, 1, rows, -1).reshape(count * rows, 1, 1, -1).expand(-1, -1, ROWS, -1)
    own_keys, own_values = (one.repeat_interleave(rows, dim=0) for one in (keys, values))
    out, logsum = segment_tiled(alone, own_keys, own_values, mask, scale)
    back = (one[:, :, 0].view(count, rows, groups, -1).transpose(1, 2) for one in (out, logsum[..., None]))
    found, sums = back
    return found.contiguous(), sums.squeeze(-1).contiguous()


@segments
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (3, 1, 10), (7, 7, 34), (16, 1, 64)])
def test_attention_equals_the_reference_at_ugly_sizes(segment: Segment, heads: int, groups: int, size: int) -> None:
    lengths = [1, 17, 63, 65, 257, 300]
    world = World(lengths, heads, groups, size)
    out = world.attend([(index, 0, length) for index, length in enumerate(lengths)], segment)
    expected = torch.cat([world.reference(index) for index in range(len(lengths))])
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0.03)


WINDOWS = (None, 1, 2, 63, 64, 65, 200, 256, 257, 300)


def featured(window: int | None, heads: int) -> tuple[float | None, torch.Tensor | None]:
    """Return a cap of the scores, or sinks, or both, or neither, by window."""
    at = WINDOWS.index(window)
    return (2.0 if at % 2 else None), (torch.linspace(-1, 3, heads).bfloat16() if at % 4 < 2 else None)


@segments
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_caps_and_sinks_equal_the_reference(segment: Segment, window: int | None) -> None:
    lengths = [1, 65, 257, 300]
    world = World(lengths, 6, 2, 16)
    softcap, sinks = featured(window, 6)
    used = segment if softcap is None else soft_capped(softcap)
    out = world.attend([(index, 0, length) for index, length in enumerate(lengths)], used, window, sinks)
    features = {"window": window, "softcap": softcap, "sinks": sinks}
    expected = torch.cat([world.reference(index, **features) for index in range(len(lengths))])
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0.03)


@segments
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_caps_and_sinks_keep_the_bits_of_a_row(segment: Segment, window: int | None) -> None:
    skip_unless_taken(segment, 2, 16)
    length = 2 * SEGMENT + 9
    world = World([length, 70], 6, 2, 16)
    softcap, sinks = featured(window, 6)
    used = segment if softcap is None else soft_capped(softcap)
    whole = world.attend([(0, 0, length)], used, window, sinks)
    for chunk in (7, 100, 256):
        pieces = itertools.pairwise([*range(0, length, chunk), length])
        assert torch.equal(torch.cat([world.attend([(0, *piece)], used, window, sinks) for piece in pieces]), whole)
    for position in (0, 1, 63, 64, 255, 256, 257, 319, 320, 511, 512, length - 1):
        beside = world.attend([(1, 3, 70), (0, position, position + 1), (1, 0, 2)], used, window, sinks)
        assert torch.equal(beside[67], whole[position])
        decoded = world.attend([(1, 69, 70), (0, position, position + 1)], used, window, sinks)
        assert torch.equal(decoded[1], whole[position])


def test_what_left_the_window_is_not_read() -> None:
    world = World([300], 4, 2, 16)
    clean = world.attend([(0, 290, 300)], SEGMENTS["fused"], 20)
    for cache in world.caches:
        cache[world.table[0, :16]] = torch.nan  # positions below 256
    assert torch.equal(world.attend([(0, 290, 300)], SEGMENTS["fused"], 20), clean)


@segments
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (3, 1, 10), (8, 8, 34), (16, 1, 64)])
def test_decode_equals_prefill_equals_chunks_in_bits(segment: Segment, heads: int, groups: int, size: int) -> None:
    skip_unless_taken(segment, groups, size)
    length = 2 * SEGMENT + 9
    world = World([length, 70], heads, groups, size)
    whole = world.attend([(0, 0, length)], segment)
    for chunk in (1, 7, 16, 100, 256):
        if chunk > 1:
            pieces = itertools.pairwise([*range(0, length, chunk), length])
            assert torch.equal(torch.cat([world.attend([(0, *piece)], segment) for piece in pieces]), whole)
    for position in (0, 1, 15, 16, 63, 64, 255, 256, 511, 512, 513, length - 1):
        beside = world.attend([(1, 3, 70), (0, position, position + 1), (1, 0, 2)], segment)
        assert torch.equal(beside[67], whole[position])
        decoded = world.attend([(1, 69, 70), (0, position, position + 1)], segment)  # without rows of padding
        assert torch.equal(decoded[1], whole[position])


@pytest.mark.parametrize("length", [64, 192, 1024])
def test_segments_of_another_length_are_as_exact(length: int) -> None:
    """Only a benchmark asks for them."""
    world, context = World([700], 6, 2, 16), 700
    for first in (0, 690, 699):
        at = torch.arange(first, context)
        plan = plan_attention(
            world.table, torch.zeros_like(at), at, 6, 2, PAGE, world.zero_slot, window=150, segment=length
        )
        ours = paged_attention(world.query[0][at], *world.caches, plan, 16**-0.5, SEGMENTS["tiled"])
        torch.testing.assert_close(ours, world.reference(0, window=150)[at], atol=0.03, rtol=0.03)


@segments
def test_many_sequences_change_no_bit_of_one(segment: Segment) -> None:
    lengths = [1 + 53 * index % 400 for index in range(41)]
    world = World(lengths, 4, 2, 32)
    together = world.attend([(index, length - 1, length) for index, length in enumerate(lengths)], segment)
    for index, length in enumerate(lengths):
        assert torch.equal(world.attend([(index, length - 1, length)], segment)[0], together[index])


@pytest.mark.parametrize("size", [10, 16, 64, 128])
def test_tiles_in_float32_are_invariant_here(size: int) -> None:
    assert verify_invariance(SEGMENTS["tiled"], 2, size, torch.bfloat16)


def test_a_segment_that_looks_at_its_neighbours_is_found_out() -> None:
    def leaning(tiles: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, logsum = segment_tiled(tiles, *others)
        return out + tiles.amax() * 2**-6, logsum

    assert not verify_invariance(Segment(leaning, any_rows=False, many_rows=False), 1, 16, torch.bfloat16)


def test_a_segment_whose_bits_depend_on_the_number_of_rows_is_found_out() -> None:
    def counting(tiles: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, logsum = steady(tiles, *others)
        return out, logsum + 2**-12 * (tiles.shape[2] == 7)

    assert verify_invariance(Segment(counting, any_rows=False, many_rows=False), 1, 16, torch.bfloat16)
    assert not verify_invariance(Segment(counting, any_rows=True, many_rows=False), 1, 16, torch.bfloat16)


def test_a_segment_whose_bits_depend_on_a_prompt_going_in_one_piece_is_found_out() -> None:
    def counting(tiles: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, logsum = steady(tiles, *others)
        return out, logsum + 2**-12 * (tiles.shape[2] > 768)

    assert verify_invariance(Segment(counting, any_rows=True, many_rows=False), 1, 16, torch.bfloat16)
    assert not verify_invariance(Segment(counting, any_rows=True, many_rows=True), 1, 16, torch.bfloat16)


def test_a_segment_whose_bits_depend_on_the_number_of_keys_is_found_out() -> None:
    def counting(tiles: torch.Tensor, keys: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, logsum = steady(tiles, keys, *others)
        return out, logsum + 2**-12 * (keys.shape[2] == 5 * 64)

    assert not verify_invariance(Segment(counting, any_rows=False, many_rows=False), 1, 16, torch.bfloat16)


def test_a_segment_that_adds_up_in_another_order_for_some_numbers_of_keys_is_found_out() -> None:
    def reordering(
        tiles: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if keys.shape[2] == 4 * 64:
            keys, values = keys.flip(2), values.flip(2)
            mask = None if mask is None else mask.flip(-1)
        return segment_tiled(tiles, keys, values, mask, scale)

    assert not verify_invariance(Segment(reordering, any_rows=False, many_rows=False), 1, 16, torch.bfloat16)


def test_merging_an_empty_state_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    state = tuple(torch.randn(shape, generator=generator) for shape in ((3, 2, ROWS), (3, 2, ROWS), (3, 2, ROWS, 8)))
    nothing = torch.zeros(3, 2, ROWS)
    empty = (torch.full_like(nothing, -torch.inf), nothing, torch.zeros(3, 2, ROWS, 8))
    for merged in (merge_state(empty, state), merge_state(state, empty)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(merged, state, strict=True))


def test_disagreeing_arguments_are_refused() -> None:
    world = World([5], 4, 2, 16)
    plan = plan_attention(world.table, torch.zeros(5, dtype=torch.long), torch.arange(5), 4, 2, PAGE, world.zero_slot)
    keys, values = world.caches
    with pytest.raises(ShapeError, match="value_cache"):
        paged_attention(world.query[0], keys, values[1:], plan, 1.0, SEGMENTS["tiled"])
    with pytest.raises(ShapeError, match="tokens"):
        paged_attention(world.query[0][:4], keys, values, plan, 1.0, SEGMENTS["tiled"])
    with pytest.raises(ShapeError, match="heads"):
        paged_attention(world.query[0][..., :8], keys, values, plan, 1.0, SEGMENTS["tiled"])
    for heads, groups in ((4, 3), (34, 2), (4, 0)):
        with pytest.raises(ShapeError, match="heads"):
            plan_attention(world.table, torch.zeros(1), torch.zeros(1), heads, groups, PAGE, world.zero_slot)
    with pytest.raises(ShapeError, match="sinks"):
        paged_attention(world.query[0], keys, values, plan, 1.0, SEGMENTS["tiled"], torch.zeros(3))
    with pytest.raises(ShapeError, match="window of 0"):
        plan_attention(world.table, torch.zeros(1), torch.zeros(1), 4, 2, PAGE, world.zero_slot, 0)
    with pytest.raises(ShapeError, match="position_of"):
        plan_attention(world.table, torch.zeros(2), torch.zeros(1), 4, 2, PAGE, world.zero_slot)
    for length in (0, 65):
        with pytest.raises(ShapeError, match=f"segments of {length} keys"):
            plan_attention(world.table, torch.zeros(1), torch.zeros(1), 4, 2, PAGE, world.zero_slot, segment=length)
