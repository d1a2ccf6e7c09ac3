"""What attention reads in a step, worked out once for all layers: query tiles, and the slots and masks of each segment.

Queries are packed into tiles of rows, (token, head of the group) by (token, head); a tile holds consecutive tokens of
one sequence. Tokens of a decode or a guess go into tiles of 16 rows, many tiles at a time. A long run of one sequence,
a prompt, goes into tiles of its own with up to `RUN_ROWS` rows, so that its keys are read once and not for every 16
rows. Keys are visited in segments of 512 at absolute positions. A key that no row of the tile may see is replaced by
the zero slot: the last block of the cache, which belongs to nobody, so that nothing unwritten is ever read. With a
window, segments that no row of a tile sees any more are not visited. Knows no query, key or value.
Source: Kwon et al., SOSP 2023 (block tables); Beltagy et al., 2020 (sliding windows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.shape import ShapeError, check_shape

TILE = 64  # keys
SEGMENT = 512  # keys, a multiple of TILE. tests/benchmarks/bench_segment.py compares it with 256 and 1,024
ROWS = 16  # query rows of a tile of few tokens
RUN_ROWS = 1024  # of a tile of a long run, at most; a multiple of ROWS. More would mask more, and hold larger masks
LONG_RUN = 4 * ROWS  # query rows beyond which a run has tiles of its own
MAX_TILES = 64  # of one product: bounds the memory of a step
NEAR_TILES = 8  # of one product where they see different numbers of keys, near in length: it goes by the longest


@dataclass(frozen=True, slots=True)
class Visit:
    """Some tiles at one segment: n tiles of R rows, K keys."""

    tiles: Tensor  # [n] int64
    slots: Tensor  # [n · K] int64  where the keys lie, block · P + offset
    keys: int  # K, a multiple of TILE, at most a segment
    mask: Tensor | None  # [n, 1, R, K] bfloat16, 0 or −∞; None: every row sees every key. R is 1 in a lone part
    unseeing: Tensor | None  # [n, 1, R] bool, rows that see no key here; None: there is none


@dataclass(frozen=True, slots=True)
class Part:
    """Some tokens of a step, in tiles of the same number of rows."""

    tokens: Tensor  # [t] int64  which of the step's, ascending
    place: Tensor  # [t] int64  tile · tokens per tile + offset, of each token
    tile_count: int
    rows: int  # of a tile, a multiple of ROWS
    tokens_per_tile: int  # at most
    visits: tuple[Visit, ...]  # of each tile in ascending order of segments; if there is one, of the tiles in order
    lone: bool  # every tile holds one token: its rows see the same
    once: bool  # every tile is visited once: nothing is to be merged


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    heads: int
    groups: int
    tokens: int  # T
    parts: tuple[Part, ...]  # every token is in one of them

    @property
    def ratio(self) -> int:
        return self.heads // self.groups


def plan_attention(
    block_table: Tensor,  # [S, M] int64  block ids; entries beyond a sequence's context are never used
    sequence_of: Tensor,  # [T] int64  which sequence each token belongs to, in runs
    position_of: Tensor,  # [T] int64  its absolute position, ascending by one within a run
    heads: int,  # H
    groups: int,  # G, divides H; H / G ≤ 16
    page: int,  # P, tokens of a block
    zero_slot: int,  # a slot that holds zeros for ever
    window: int | None = None,  # keys a token sees, its own included, ≥ 1; None: all up to its own
    segment: int = SEGMENT,  # keys, a multiple of TILE; sums are taken by segments, so that another has bits of its own
) -> AttentionPlan:
    """Return the plan of a step for every layer whose cache has this layout.

    Raises:
        ShapeError: an argument disagrees with the shapes above.
    """
    tokens = sequence_of.shape[0]
    check_shape("position_of", position_of, tokens)
    if tokens < 1 or groups < 1 or heads % groups or heads // groups > ROWS:
        raise ShapeError(f"{tokens} tokens, {heads} heads in {groups} groups: at most {ROWS} heads a group")
    if window is not None and window < 1:
        raise ShapeError(f"a window of {window} keys holds not even the token's own")
    if segment < 1 or segment % TILE:
        raise ShapeError(f"segments of {segment} keys are not made of tiles of {TILE}")
    layout = _Layout(heads // groups, window, page, zero_slot, segment)
    _, lengths = torch.unique_consecutive(sequence_of, return_counts=True)
    parts: list[Part] = []
    short = (lengths * layout.ratio <= LONG_RUN).repeat_interleave(lengths).nonzero().squeeze(1)
    if len(short):
        parts.append(_short_runs(layout, short, sequence_of[short], position_of[short], block_table))
    first = 0
    for length in lengths.tolist():
        if length * layout.ratio > LONG_RUN:
            for run in torch.split(torch.arange(first, first + length), RUN_ROWS // layout.ratio):
                parts.append(_long_run(layout, run, position_of[run], block_table[sequence_of[first]]))
        first += length
    return AttentionPlan(heads, groups, tokens, tuple(parts))


@dataclass(frozen=True, slots=True)
class _Layout:
    ratio: int  # heads of a group
    window: int | None
    page: int
    zero_slot: int
    segment: int  # keys


def _short_runs(layout: _Layout, tokens: Tensor, sequence_of: Tensor, position_of: Tensor, table: Tensor) -> Part:
    per_tile = ROWS // layout.ratio
    if not bool((sequence_of[1:] == sequence_of[:-1]).any()):
        visits = tuple(_visits(layout, position_of[:, None], table[sequence_of]))
        place = torch.arange(len(tokens)) * per_tile
        return Part(tokens, place, len(tokens), ROWS, per_tile, visits, lone=True, once=_once(visits, len(tokens)))
    place = _place(sequence_of, per_tile)
    count = int(place[-1]) // per_tile + 1
    starts = torch.zeros(count, dtype=torch.long)
    starts[place[place % per_tile == 0] // per_tile] = position_of[place % per_tile == 0]
    positions = starts.repeat_interleave(per_tile)  # a padding row sees what the tile's first row sees
    positions[place] = position_of
    sequence = torch.zeros(count, dtype=torch.long)
    sequence[place // per_tile] = sequence_of
    visits = tuple(_visits(layout, _padded(positions.view(count, per_tile), layout.ratio), table[sequence]))
    return Part(tokens, place, count, ROWS, per_tile, visits, lone=False, once=_once(visits, count))


def _long_run(layout: _Layout, tokens: Tensor, position_of: Tensor, blocks: Tensor) -> Part:
    count = len(tokens)
    rows = _padded(position_of[None], layout.ratio)
    visits = tuple(_visits(layout, rows, blocks[None]))
    return Part(tokens, torch.arange(count), 1, rows.shape[1], count, visits, lone=False, once=_once(visits, 1))


def _once(visits: tuple[Visit, ...], tiles: int) -> bool:
    return sum(len(visit.tiles) for visit in visits) == tiles


def _padded(positions: Tensor, ratio: int) -> Tensor:
    """Return the position of every row of tiles [n, tokens]; what pads them to whole 16s sees what the first sees."""
    rows = positions.repeat_interleave(ratio, dim=1)
    return torch.cat((rows, rows[:, :1].expand(-1, -rows.shape[1] % ROWS)), dim=1)


def _place(sequence_of: Tensor, per_tile: int) -> Tensor:
    """A tile begins where the sequence changes, and after every `per_tile` tokens of one sequence."""
    index = torch.arange(len(sequence_of))
    begins = torch.ones(len(sequence_of), dtype=torch.bool)
    begins[1:] = sequence_of[1:] != sequence_of[:-1]
    offset = index - torch.where(begins, index, 0).cummax(0).values
    tile = (offset % per_tile == 0).long().cumsum(0) - 1
    return tile * per_tile + offset % per_tile


def _visits(layout: _Layout, rows: Tensor, table: Tensor) -> Iterator[Visit]:
    """Rows are positions [tiles, R]; table [tiles, M] holds the blocks of each tile's sequence."""
    first, last = rows.amin(dim=1), rows.amax(dim=1)
    for start in range(0, int(last.max()) + 1, layout.segment):
        end = start + layout.segment - 1
        reached = last >= start
        whole = reached & (first >= end)
        if layout.window is not None:
            reached &= first - layout.window < end
            whole &= last - layout.window < start
        for tiles in (*_together(whole), *_near(reached & ~whole, last)):
            yield _visit(layout, tiles, start, rows[tiles], table[tiles])


def _together(chosen: Tensor) -> tuple[Tensor, ...]:
    tiles = chosen.nonzero().squeeze(1)
    return torch.split(tiles, MAX_TILES) if len(tiles) else ()


def _near(chosen: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """Return the tiles by a few whose last positions are near each other."""
    tiles = chosen.nonzero().squeeze(1)
    if len(tiles) > NEAR_TILES:
        tiles = tiles[last[tiles].argsort(stable=True)]
    return torch.split(tiles, NEAR_TILES) if len(tiles) else ()


def _visit(layout: _Layout, tiles: Tensor, start: int, rows: Tensor, table: Tensor) -> Visit:
    window, page = layout.window, layout.page
    last = rows.amax(dim=1)
    keys = min(layout.segment, -(-(int(last.max()) + 1 - start) // TILE) * TILE)
    at = torch.arange(start, start + keys)
    column = (at // page).clamp(max=table.shape[1] - 1)  # beyond the table nothing is visible
    seen = at <= last[:, None]  # [n, K] by some row of the tile
    visible = at <= rows[..., None]  # [n, R, K]
    unseeing = rows < start
    if window is not None:
        seen &= at > rows.amin(dim=1)[:, None] - window
        visible &= at > rows[..., None] - window
        unseeing |= rows - window >= start + keys - 1
    slots = torch.where(seen, table[:, column] * page + at % page, layout.zero_slot)
    if bool(visible.all()):
        return Visit(tiles, slots.reshape(-1), keys, None, None)
    mask = torch.where(visible | unseeing[..., None], 0.0, -torch.inf)[:, None].to(torch.bfloat16)
    return Visit(tiles, slots.reshape(-1), keys, mask, unseeing[:, None, :] if bool(unseeing.any()) else None)
