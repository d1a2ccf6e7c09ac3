"""Decode and prefill by their kernels: each equals float64, and both are one and the same in bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kernels.attention_state import AttentionVariant
from kernels.jit import INTERPRETED
from kernels.shape import ShapeError
from tests.support.batches import DTYPE, MOST_ROWS, assert_rows_are_their_own
from tests.support.paged_world import PagedWorld

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
TOLERANCE = {BFLOAT16: 0.02, FLOAT16: 0.003}
LENGTHS = [1, 17, 63, 65, 257, 300]
LAYOUTS = [  # heads, groups, size of a head
    ((4, 2, 64), BFLOAT16),
    ((3, 3, 80), FLOAT16),
    ((7, 1, 96), BFLOAT16),
    ((8, 2, 128), BFLOAT16),
    ((5, 1, 128), FLOAT16),
    ((16, 1, 256), BFLOAT16),
    ((3, 1, 10), BFLOAT16),
]
VARIANTS = {
    "window of one": AttentionVariant(window=1),
    "window in a tile": AttentionVariant(window=37),
    "window of a tile": AttentionVariant(window=64),
    "window over segments": AttentionVariant(window=290),
    "cap": AttentionVariant(soft_cap=1.5),
    "window and cap": AttentionVariant(window=100, soft_cap=30.0),
}
Layout = tuple[int, int, int]


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, atol=TOLERANCE[out.dtype], rtol=TOLERANCE[out.dtype])


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, ids=str)
def test_decode_equals_the_reference_among_poison(
    layout: Layout, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    world = PagedWorld(LENGTHS, layout, dtype, device, generator)
    out = world.decode([(index, length - 1) for index, length in enumerate(LENGTHS)])
    close(out, world.reference([(index, length - 1, length) for index, length in enumerate(LENGTHS)]))


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, ids=str)
def test_prefill_equals_the_reference_among_poison(
    layout: Layout, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    world = PagedWorld(LENGTHS, layout, dtype, device, generator)
    pieces = [(0, 0, 1), (1, 3, 17), (2, 0, 0), (3, 60, 65), (4, 100, 257), (5, 299, 300), (2, 0, 63)]
    close(world.prefill(pieces), world.reference(pieces))


@pytest.mark.parametrize("ratio", range(1, 17))
def test_any_number_of_heads_that_share_a_key_up_to_16_equals_the_reference_and_prefill_decode(
    ratio: int, device: torch.device, generator: torch.Generator
) -> None:
    """Each with another size of a head; on a GPU with all of them, and with both dtypes."""
    sizes, dtypes = [64, 80, 96, 128, 256], [BFLOAT16, FLOAT16]
    every = list(itertools.product(sizes, dtypes))
    for size, dtype in [(sizes[ratio % 5], dtypes[ratio % 2])] if INTERPRETED else every:
        world = PagedWorld([1, 70], (2 * ratio, 2, size), dtype, device, generator)
        pieces = [(0, 0, 1), (1, 68, 70)]
        filled = world.prefill(pieces)
        close(filled, world.reference(pieces))
        assert torch.equal(world.decode([(0, 0), (1, 68), (1, 69)]), filled)


@pytest.mark.parametrize("name", VARIANTS)
def test_windows_and_caps_equal_the_reference_and_each_other(
    name: str, device: torch.device, generator: torch.Generator
) -> None:
    world = PagedWorld(LENGTHS, (4, 2, 64), BFLOAT16, device, generator, VARIANTS[name])
    pieces = [(0, 0, 1), (3, 0, 65), (5, 270, 300)]
    whole = world.prefill(pieces)
    close(whole, world.reference(pieces))
    alone = world.decode([(0, 0), (3, 63), (3, 64), (5, 270), (5, 299)])
    assert torch.equal(alone, whole[[0, 64, 65, 66, 95]])


@pytest.mark.parametrize("window", [None, 40, 270])
def test_sinks_equal_the_reference_and_one_that_is_huge_leaves_nothing(
    window: int | None, device: torch.device, generator: torch.Generator
) -> None:
    sinks = torch.randn(6, generator=generator).mul(2).to(device)
    sinks[1], sinks[2] = 1e4, -torch.inf
    world = PagedWorld(LENGTHS, (6, 2, 64), BFLOAT16, device, generator, AttentionVariant(window=window, sinks=sinks))
    pieces = [(1, 0, 17), (5, 280, 300)]
    whole = world.prefill(pieces)
    close(whole, world.reference(pieces))
    assert (whole[:, 1] == 0).all()
    assert torch.equal(world.decode([(1, 16), (5, 280), (5, 299)]), whole[[16, 17, 36]])


@pytest.mark.parametrize("layout", [(4, 2, 64), (3, 1, 80), (16, 1, 128), (2, 1, 256)], ids=str)
def test_prefill_equals_decode_equals_chunks_in_bits(
    layout: Layout, device: torch.device, generator: torch.Generator
) -> None:
    length = 521 if INTERPRETED else 4133
    world = PagedWorld([length, 70], layout, BFLOAT16, device, generator)
    runs = [(0, 20), (250, 262), (505, 521)] if INTERPRETED else [(0, length)]  # a run is enough to look about an edge
    whole = world.prefill([(0, *run) for run in runs])
    for chunk in (7,) if INTERPRETED else (7, 100, 256, 511):
        pieces = [piece for run in runs for piece in itertools.pairwise([*range(*run, chunk), run[1]])]
        together = world.prefill([(1, 9, 13), *((0, *piece) for piece in pieces)])
        assert torch.equal(together[4:], whole)
        if not INTERPRETED:
            assert torch.equal(torch.cat([world.prefill([(0, *piece)]) for piece in pieces]), whole)
    asked = [position for run in runs for position in range(*run)]
    positions = [0, 1, 15, 16, 255, 256, 257, 510, 511, 512, length - 1]
    expected = whole[[asked.index(position) for position in positions]]
    assert torch.equal(world.decode([(0, position) for position in positions]), expected)
    assert torch.equal(world.decode([(1, 69), (0, positions[-1])])[1], expected[-1])
    assert torch.equal(world.prefill([(0, position, position + 1) for position in positions]), expected)


@pytest.mark.parametrize(
    "variant",
    [AttentionVariant(), AttentionVariant(window=270), AttentionVariant(window=1, soft_cap=3.0)],
    ids=["full", "window over segments", "window of one"],
)
def test_who_arrives_last_merges_to_the_same_bits_and_leaves_its_counters_at_zero(
    variant: AttentionVariant, device: torch.device, generator: torch.Generator
) -> None:
    lengths = [1, 256, 257, 520] if INTERPRETED else [1 + 97 * index % 8000 for index in range(64)]
    sinks = torch.randn(6, generator=generator).to(device)
    variant = replace(variant, sinks=sinks)
    world = PagedWorld(lengths, (6, 2, 64), BFLOAT16, device, generator, variant)
    rows = [(0, -1), *((index, length - 1) for index, length in enumerate(lengths))]  # the first is padding
    expected = world.decode(rows)
    arrived = torch.zeros(len(rows) + 3, 2, dtype=torch.int32, device=device)
    for _ in range(2 if INTERPRETED else 50):
        assert torch.equal(world.decode(rows, arrived), expected)
        assert not arrived.any()


def test_counters_of_another_kind_are_refused(device: torch.device, generator: torch.Generator) -> None:
    world = PagedWorld([5, 7], (4, 2, 64), BFLOAT16, device, generator)
    for arrived in (torch.zeros(1, 2).int(), torch.zeros(2, 1).int(), torch.zeros(2, 2)):
        with pytest.raises(ShapeError, match="`arrived`"):
            world.decode([(0, 4), (1, 6)], arrived.to(device))


def test_many_sequences_change_no_bit_of_one(device: torch.device, generator: torch.Generator) -> None:
    """In the interpreter their contexts are short but for some, and beyond 260 most rows are padding."""
    lengths = [300, 257, 256, 70, 20] if INTERPRETED else [1 + 53 * index % 300 for index in range(MOST_ROWS)]
    layout = (2, 1, 10) if INTERPRETED else (4, 2, 64)
    world = PagedWorld(lengths, layout, DTYPE, device, generator)

    def context(row: int) -> int:
        if not INTERPRETED:
            return lengths[row]
        if row > 260 and row % 128 not in (0, 127):
            return 0
        return lengths[row % 5] if row % 37 == 0 else 1 + row % 20

    asked = [(row % len(lengths), context(row) - 1) for row in range(MOST_ROWS)]
    assert_rows_are_their_own(lambda part: [world.decode(asked[part])])
    some = asked[: 40 if INTERPRETED else MOST_ROWS]
    together = world.prefill([(index, position, position + 1) for index, position in some])
    assert torch.equal(together, world.decode(some))


def test_prompts_of_many_rows_have_the_bits_of_their_chunks_and_of_decode_whatever_stands_beside_them(
    device: torch.device, generator: torch.Generator
) -> None:
    lengths, layout = [MOST_ROWS, 255, 256, 257], (1, 1, 10) if INTERPRETED else (8, 2, 128)
    world = PagedWorld(lengths, layout, DTYPE, device, generator)
    whole = [world.prefill([(index, 0, length)]) for index, length in enumerate(lengths)]
    every = [(index, 0, length) for index, length in enumerate(lengths)]
    assert torch.equal(world.prefill([*every[1:], every[0]]), torch.cat([*whole[1:], whole[0]]))
    for chunk in (257,) if INTERPRETED else (255, 256, 257):
        pieces = [(0, *piece) for piece in itertools.pairwise([*range(0, MOST_ROWS, chunk), MOST_ROWS])]
        assert torch.equal(world.prefill([every[1], *pieces, every[3]]), torch.cat([whole[1], whole[0], whole[3]]))
    for index, length in enumerate(lengths):
        edges = {edge + side for edge in (1, 16, 64, 128, 256, 512, length) for side in (-1, 0)}
        asked = sorted(position for position in edges if position < length)
        assert torch.equal(world.decode([(index, position) for position in asked]), whole[index][asked])


def test_what_is_not_a_number_in_one_sequence_stays_there(device: torch.device, generator: torch.Generator) -> None:
    world = PagedWorld([40, 300, 80], (4, 2, 64), BFLOAT16, device, generator)
    rows, pieces = [(0, 39), (1, 299), (2, 79)], [(0, 0, 40), (1, 290, 300), (2, 3, 80)]
    decoded, filled = world.decode(rows), world.prefill(pieces)
    for cache in (world.keys, world.values):
        cache[world.table[1, :4].long()] = torch.nan
    again = world.decode(rows)
    assert torch.equal(again[[0, 2]], decoded[[0, 2]])
    assert again[1].isnan().any()
    again = world.prefill(pieces)
    assert torch.equal(torch.cat((again[:40], again[50:])), torch.cat((filled[:40], filled[50:])))


def test_wider_tables_and_wider_integers_change_no_bit(device: torch.device, generator: torch.Generator) -> None:
    world = PagedWorld([5, 290], (4, 2, 64), BFLOAT16, device, generator)
    rows, pieces = [(0, 4), (1, 289)], [(0, 0, 5), (1, 280, 290)]
    decoded, filled = world.decode(rows), world.prefill(pieces)
    beyond = world.table[:, -1:].expand(-1, 40)
    world.table = torch.cat((world.table, beyond), dim=1).long()
    assert torch.equal(world.decode(rows), decoded)
    assert torch.equal(world.prefill(pieces), filled)


def test_scores_far_apart_neither_overflow_nor_vanish(device: torch.device, generator: torch.Generator) -> None:
    world = PagedWorld([400], (2, 1, 64), BFLOAT16, device, generator)
    world.query[0].mul_(200)
    pieces = [(0, 380, 400)]
    out = world.prefill(pieces)
    close(out, world.reference(pieces))
    assert torch.equal(world.decode([(0, 399)])[0], out[-1])


def test_a_row_of_padding_is_zeros_and_changes_no_bit_beside_it(
    device: torch.device, generator: torch.Generator
) -> None:
    world = PagedWorld([5, 290], (4, 2, 64), BFLOAT16, device, generator)
    out = world.decode([(0, 4), (0, -1), (1, 289)])
    assert (out[1] == 0).all()
    assert torch.equal(out[[0, 2]], world.decode([(0, 4), (1, 289)]))


def test_nothing_asked_is_an_empty_answer(device: torch.device, generator: torch.Generator) -> None:
    world = PagedWorld([5], (2, 1, 64), BFLOAT16, device, generator)
    assert world.prefill([(0, 2, 2)]).shape == (0, 2, 64)
