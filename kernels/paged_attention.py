"""Attention over the paged cache: causal, grouped heads, every row's bits independent of everything else.

Numeric contract. The keys of a sequence are taken in segments of 512 at *absolute* positions; each gives a softmax
state (m, l, o), and states are merged in ascending order. A decode step's one token and a prefill's many go through
the same products of query rows by a segment, so that prefill == decode == chunked == cache hit, in bits. Two ways to a
segment's state keep that: `segment_fused` is the library's one-pass kernel; `segment_tiled` walks tiles of 64 keys in
float32, 16 rows at a time. Where the library gives a row the same bits among any 2 to 16, one token of a sequence goes
without the rows that would be padding; where it does among any multiple of 16, a prompt goes in one piece, whose keys
are read once. (Among 33 rows, whose last stands alone in the library's own tiles, it does not.)
`verify_invariance` tests a machine for all of it. (On Zen 5, without AMX, the library adds up the values of 256 and of
320 keys in another order than those of 512: there it keeps none of this, and tiles are walked.) Keys that a row may not
see change no bit, unless they are its own sequence's and not finite. A sink is a state of its own, merged before the
first segment. A cache may hold float8, see float8.py: what is read of it is widened first, and nothing else changes.

Source: Kwon et al., SOSP 2023 (block tables); Milakov and Gimelshein, 2018 (one-pass softmax); Dao et al., 2022;
Gemma 2, 2024 (soft-capped scores); Xiao et al., 2024, and GPT-OSS, 2025 (sinks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_plan import ROWS, RUN_ROWS, SEGMENT, TILE, AttentionPlan, Part, Visit
from kernels.float8 import FLOAT8, check_caches, from_float8
from kernels.shape import ShapeError, check_shape

State = tuple[Tensor, Tensor, Tensor]  # m [n, G, R] running maximum, l [n, G, R] sum, o [n, G, R, D] weighted sum
LEAST_ROWS = 2  # one row alone is another product in the library
MANY_ROWS = (32, 48, 80, 176, 208, 752, 784, RUN_ROWS)  # around where the library's tiles grow
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Segment:
    """A way to the state of a segment."""

    attend: Attend  # see `segment_fused`
    any_rows: bool  # a row's bits are the same among LEAST_ROWS … 16; else it is given no fewer than 16
    many_rows: bool  # a row's bits are the same among any multiple of 16; else it is given no more than 16


def paged_attention(
    query: Tensor,  # [T, H, D]
    key_cache: Tensor,  # [N + 1, P, G, D]  same dtype, or float8; the last block is zero
    value_cache: Tensor,  # [N + 1, P, G, D]
    plan: AttentionPlan,  # of these T tokens and this layout
    scale: float,  # multiplies query·key before softmax
    segment: Segment,
    sinks: Tensor | None = None,  # [H]  a score of each head that takes its share of the softmax and gives no value
) -> Tensor:  # [T, H, D]
    """Return the attention of each token over the keys its plan lets it see; its own key is stored already.

    Token t reads the blocks that hold positions 0 … its own of its own sequence and nothing else of the pool.

    Raises:
        ShapeError: an argument disagrees with the shapes or dtypes above.

    Cost: one pass over the keys and values of each sequence for every 16 rows (token, head of a group), of a long run
    for every 1,024.
    """
    tokens, heads, size = query.shape
    check_shape("value_cache", value_cache, *key_cache.shape)
    if tokens != plan.tokens:
        raise ShapeError(f"`query` has {tokens} tokens, the plan {plan.tokens}")
    check_caches(query.dtype, key_cache, value_cache)
    if heads != plan.heads or key_cache.shape[2:] != (plan.groups, size):
        raise ShapeError(f"{heads} heads of {size} do not fit the plan or a cache of {list(key_cache.shape)}")
    if sinks is not None:
        check_shape("sinks", sinks, plan.heads)
    grouped = query.view(tokens, plan.groups, plan.ratio, size)
    if len(plan.parts) == 1:
        return _attended(grouped, key_cache, value_cache, plan.parts[0], scale, segment, sinks).view_as(query)
    out = torch.empty_like(grouped)
    for part in plan.parts:
        out[part.tokens] = _attended(grouped[part.tokens], key_cache, value_cache, part, scale, segment, sinks)
    return out.view_as(query)


def _attended(
    query: Tensor,  # [t, G, H / G, D]
    key_cache: Tensor,
    value_cache: Tensor,
    part: Part,
    scale: float,
    segment: Segment,
    sinks: Tensor | None,
) -> Tensor:  # [t, G, H / G, D]
    """Return the attention of the tokens of one part."""
    ratio = query.shape[2]
    tiles = _pack(query, part, segment.any_rows)
    if part.once and sinks is None:
        return _unpack(_seen_once(tiles, key_cache, value_cache, part, scale, segment), part, ratio)
    total = _empty(tiles) if sinks is None else _sunk(tiles, sinks, ratio)
    for visit in part.visits:
        out, logsum = _visit(tiles[visit.tiles], key_cache, value_cache, visit, scale, segment)
        before: State = (total[0][visit.tiles], total[1][visit.tiles], total[2][visit.tiles])
        merged = merge_state(before, (logsum, torch.isfinite(logsum).float(), out.float()))
        for whole, new in zip(total, merged, strict=True):
            whole[visit.tiles] = new
    return _unpack((total[2] / total[1][..., None]).to(query.dtype), part, ratio)


def _seen_once(
    tiles: Tensor, key_cache: Tensor, value_cache: Tensor, part: Part, scale: float, segment: Segment
) -> Tensor:
    if len(part.visits) == 1:
        return _visit(tiles, key_cache, value_cache, part.visits[0], scale, segment)[0]
    out = torch.empty_like(tiles)
    for visit in part.visits:
        out[visit.tiles] = _visit(tiles[visit.tiles], key_cache, value_cache, visit, scale, segment)[0]
    return out


def _pack(query: Tensor, part: Part, any_rows: bool) -> Tensor:
    """Return [n, G, R, D]; rows without a token are zero. R is the part's, or fewer where every tile has one token."""
    tokens, groups, ratio, size = query.shape
    if part.lone:
        missing = max(LEAST_ROWS if any_rows else ROWS, ratio) - ratio
        return F.pad(query, (0, 0, 0, missing)) if missing else query
    tiles = query.new_zeros(part.tile_count, groups, part.rows, size)
    by_token = _by_token(tiles, part, ratio)
    if part.tile_count == 1:
        by_token[0, :, :tokens] = query.transpose(0, 1)
    else:
        by_token[part.place // part.tokens_per_tile, :, part.place % part.tokens_per_tile] = query
    return tiles


def _unpack(tiles: Tensor, part: Part, ratio: int) -> Tensor:
    """Return the tokens' rows, [t, G, H / G, D]."""
    if part.lone:
        return tiles[:, :, :ratio].contiguous()
    by_token = _by_token(tiles, part, ratio)
    if part.tile_count == 1:
        return by_token[0, :, : len(part.tokens)].transpose(0, 1).contiguous()
    return by_token[part.place // part.tokens_per_tile, :, part.place % part.tokens_per_tile]


def _by_token(tiles: Tensor, part: Part, ratio: int) -> Tensor:
    """Return the rows that may be a token's, [n, G, tokens of a tile, H / G, D]."""
    count, groups, _, size = tiles.shape
    return tiles[:, :, : part.tokens_per_tile * ratio].view(count, groups, part.tokens_per_tile, ratio, size)


def _sunk(tiles: Tensor, sinks: Tensor, ratio: int) -> State:
    """Return the state of rows that have seen their head's sink and no key; rows are heads of a group, by turns."""
    _, sums, weighted = _empty(tiles)
    groups, rows = tiles.shape[1:3]
    scores = sinks.float().view(groups, ratio).repeat(1, -(-rows // ratio))[:, :rows]  # what pads has one too
    return scores.expand_as(sums).clone(), torch.ones_like(sums), weighted


def _visit(
    tiles: Tensor, key_cache: Tensor, value_cache: Tensor, visit: Visit, scale: float, segment: Segment
) -> tuple[Tensor, Tensor]:
    """Return a segment's attention [n, G, R, D] and the logarithm of its sum [n, G, R]; unseeing rows: 0, −∞."""
    keys, values = (_gather(cache, visit, tiles.dtype) for cache in (key_cache, value_cache))
    mask = None if visit.mask is None else visit.mask.expand(-1, -1, tiles.shape[2], -1)
    attend = segment.attend if segment.many_rows or tiles.shape[2] <= ROWS else partial(_by_sixteen, segment.attend)
    out, logsum = attend(tiles, keys, values, mask, scale)
    if visit.unseeing is not None:
        out = out.masked_fill(visit.unseeing[..., None], 0.0)
        logsum = logsum.masked_fill(visit.unseeing, -torch.inf)
    return out, logsum


def _by_sixteen(
    attend: Attend, tiles: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Let `attend` see a tile of more rows, [1, G, R, D], as tiles of 16 that share their keys."""
    _, groups, rows, size = tiles.shape
    count = rows // ROWS
    split = tiles.view(groups, count, ROWS, size).transpose(0, 1)
    keys, values = (one.expand(count, -1, -1, -1) for one in (keys, values))
    masks = None if mask is None else mask.reshape(count, 1, ROWS, -1)
    out, logsum = attend(split, keys, values, masks, scale)
    return out.transpose(0, 1).reshape(tiles.shape), logsum.transpose(0, 1).reshape(1, groups, rows)


def _gather(cache: Tensor, visit: Visit, dtype: torch.dtype) -> Tensor:
    groups, size = cache.shape[2:]
    rows = cache.view(-1, groups * size)
    if cache.dtype == FLOAT8:
        rows = from_float8(rows.view(torch.uint8).index_select(0, visit.slots).view(FLOAT8), dtype)
    else:
        rows = rows.index_select(0, visit.slots)
    return rows.view(-1, visit.keys, groups, size).transpose(1, 2)


def segment_fused(
    tiles: Tensor,  # [n, G, R, D]
    keys: Tensor,  # [n, G, K, D]
    values: Tensor,  # [n, G, K, D]
    mask: Tensor | None,  # [n, 1, R, K]  0 or −∞, same dtype
    scale: float,
) -> tuple[Tensor, Tensor]:  # [n, G, R, D] same dtype, [n, G, R] float32
    """Return softmax(scale · q·kᵀ + mask)·v and the logarithm of each row's sum, by the library's one-pass kernel."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logsum = fused(tiles, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    return out, logsum


def segment_tiled(
    tiles: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the same in float32, tile of 64 keys by tile, rounded once: [16, D]·[D, 64] and [16, 64]·[64, D].

    With `softcap` > 0, every score is bent below it first: softcap · tanh(score / softcap).
    """
    n, groups, _, size = tiles.shape
    if missing := -size % ROWS:  # in products of an odd width a row's bits were seen to depend on its place (Zen 5)
        tiles, keys, values = (F.pad(one, (0, missing)) for one in (tiles, keys, values))
        out, logsum = segment_tiled(tiles, keys, values, mask, scale, softcap)
        return out[..., :size].contiguous(), logsum
    query = tiles.float().reshape(-1, ROWS, size)
    state = _empty(tiles)
    for start in range(0, keys.shape[2], TILE):
        part = slice(start, start + TILE)
        scores = torch.bmm(query, keys[:, :, part].float().reshape(-1, TILE, size).transpose(1, 2))
        scores = scores.view(n, groups, ROWS, TILE) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + mask[..., part].float()
        maximum = scores.amax(dim=-1)
        weights = torch.exp(scores - _finite(maximum)[..., None])
        weighted = torch.bmm(weights.view(-1, ROWS, TILE), values[:, :, part].float().reshape(-1, TILE, size))
        state = merge_state(state, (maximum, weights.sum(dim=-1), weighted.view(n, groups, ROWS, size)))
    maximum, sums, weighted = state
    return (weighted / sums[..., None]).to(tiles.dtype), maximum + sums.log()


def soft_capped(softcap: float) -> Segment:
    """Return the segment attention of scores bent below `softcap`. The library's kernel has none."""
    return Segment(partial(segment_tiled, softcap=softcap), any_rows=False, many_rows=False)


def merge_state(left: State, right: State) -> State:
    """Return the state over the keys of both; `left` holds the earlier ones. An empty side changes no bit."""
    maximum = torch.maximum(left[0], right[0])
    shift = _finite(maximum)
    before, after = torch.exp(left[0] - shift), torch.exp(right[0] - shift)
    weighted = left[2] * before[..., None] + right[2] * after[..., None]
    return maximum, left[1] * before + right[1] * after, weighted


def _empty(tiles: Tensor) -> State:
    narrow = torch.zeros(tiles.shape[:-1])
    return torch.full_like(narrow, -torch.inf), narrow, torch.zeros(tiles.shape)


def _finite(maximum: Tensor) -> Tensor:
    """Where nothing was seen yet, shift by 0 instead of −∞, whose difference with itself is NaN."""
    return torch.where(torch.isneginf(maximum), 0.0, maximum)


SEGMENTS = {  # the faster first
    "fused": Segment(segment_fused, any_rows=True, many_rows=True),
    "fused_up_to_16": Segment(segment_fused, any_rows=True, many_rows=False),
    "fused_16": Segment(segment_fused, any_rows=False, many_rows=False),
    "tiled": Segment(segment_tiled, any_rows=False, many_rows=False),
}


def verify_invariance(segment: Segment, groups: int, size: int, dtype: torch.dtype) -> bool:
    """Return whether `segment` gives a row the same bits here whatever stands beside it.

    Tried: fewer tiles, other rows in the tile, the row elsewhere, keys cut off that it does not see, zeros in their
    place, no mask instead of an empty one; and where it may have fewer rows than 16 or more, fewer and more. Values are
    such that what is weighted nearly cancels out: what is left is of the order in which it was added up.
    """
    attend = segment.attend
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(33, groups, ROWS, size, generator=generator, dtype=dtype)
    keys, values = _cancelling(33, groups, size, dtype, generator)
    seen = torch.randint(0, TILE, (33, 1, ROWS), generator=generator)
    mask = torch.where(torch.arange(SEGMENT) <= seen[..., None], 0.0, -torch.inf).to(dtype)
    scale = size**-0.5

    whole = attend(tiles, keys, values, mask, scale)
    for part in (slice(0, 1), slice(5, 7), slice(32, 33), slice(3, 20)):
        if not _same(
            attend(tiles[part], keys[part], values[part], mask[part], scale), (whole[0][part], whole[1][part])
        ):
            return False
    for shift in (1, 7, 15):
        moved = attend(tiles.roll(shift, 2), keys, values, mask.roll(shift, 2), scale)
        if not _same((moved[0].roll(-shift, 2), moved[1].roll(-shift, 2)), whole):
            return False
    beyond = torch.arange(SEGMENT)[:, None] >= TILE
    short = attend(tiles, keys[:, :, :TILE], values[:, :, :TILE], mask[..., :TILE].contiguous(), scale)
    zeroed = attend(tiles, keys.masked_fill(beyond, 0.0), values.masked_fill(beyond, 0.0), mask, scale)
    open_mask = attend(tiles, keys, values, torch.zeros_like(mask), scale)
    whole_open = attend(tiles, keys, values, None, scale)
    if segment.any_rows and not _keeps_fewer_rows(attend, tiles, keys, values, whole_open):
        return False
    if segment.many_rows and not _keeps_more_rows(attend, groups, size, dtype):
        return False
    if not _keeps_fewer_keys(attend, tiles, keys, values):
        return False
    return _same(short, whole) and _same(zeroed, whole) and _same(whole_open, open_mask)


def _cancelling(
    count: int, groups: int, size: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return keys and values [n, G, K, D] of a segment; in a tile, every key has its like, whose value is the other's
    negative."""
    shape = count, SEGMENT // TILE, TILE // 2, groups, size
    half, value = (torch.randn(shape, generator=generator, dtype=dtype) for _ in "kv")
    both = torch.cat((half, half), dim=2), torch.cat((value, -value), dim=2)
    keys, values = (one.view(count, SEGMENT, groups, size).transpose(1, 2) for one in both)
    return keys, values


def _keeps_fewer_keys(attend: Attend, tiles: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether rows have the bits of a whole segment where the keys that none of them sees are not given."""
    scale = tiles.shape[-1] ** -0.5
    for count in range(TILE, SEGMENT, TILE):
        mask = torch.where(torch.arange(SEGMENT) < count, 0.0, -torch.inf).to(tiles.dtype)
        whole = attend(tiles, keys, values, mask.expand(len(tiles), 1, tiles.shape[2], -1), scale)
        if not _same(attend(tiles, keys[:, :, :count], values[:, :, :count], None, scale), whole):
            return False
    return True


def _keeps_more_rows(attend: Attend, groups: int, size: int, dtype: torch.dtype) -> bool:
    """Return whether rows have among more the bits that they have among 16, wherever they stand among them."""
    generator = torch.Generator().manual_seed(1)
    tile = torch.randn(1, groups, RUN_ROWS, size, generator=generator, dtype=dtype)
    keys, values = _cancelling(1, groups, size, dtype, generator)
    seen = torch.randint(0, TILE, (RUN_ROWS, 1), generator=generator)
    for count, open_ in ((TILE, False), (5 * TILE, False), (SEGMENT, False), (SEGMENT, True)):  # keys
        visible = torch.arange(count) <= seen * (count // TILE)
        mask = None if open_ else torch.where(visible, 0.0, -torch.inf).to(dtype)[None, None]
        key, value = keys[:, :, :count], values[:, :, :count]
        whole = _by_sixteen(attend, tile, key, value, mask, size**-0.5)
        for rows in MANY_ROWS:
            for part in (slice(0, rows), slice(RUN_ROWS - rows, RUN_ROWS)):
                some = None if mask is None else mask[:, :, part]
                found = attend(tile[:, :, part], key, value, some, size**-0.5)
                if not _same(found, (whole[0][:, :, part], whole[1][:, :, part])):
                    return False
    return True


def _keeps_fewer_rows(
    attend: Attend, tiles: Tensor, keys: Tensor, values: Tensor, whole: tuple[Tensor, Tensor]
) -> bool:
    """Return whether rows have among fewer the bits that they have in `whole`, at every key and at some."""
    scale = tiles.shape[-1] ** -0.5
    some = attend(tiles, keys[:, :, :TILE], values[:, :, :TILE], None, scale)
    for rows in range(LEAST_ROWS, ROWS):
        left = tiles[:, :, :rows].contiguous()
        for count, expected in ((SEGMENT, whole), (TILE, some)):
            fewer = attend(left, keys[:, :, :count], values[:, :, :count], None, scale)
            if not _same(fewer, (expected[0][:, :, :rows], expected[1][:, :, :rows])):
                return False
    return True


def _same(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


def paged_attention_reference(
    query: Tensor,  # [T, H, D]
    key_cache: Tensor,  # [N + 1, P, G, D]
    value_cache: Tensor,
    block_table: Tensor,  # [S, M] int64
    sequence_of: Tensor,  # [T] int64
    position_of: Tensor,  # [T] int64
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # [T, H, D]
    """Return the same, one token and head at a time, in float64."""
    page, groups = key_cache.shape[1], key_cache.shape[2]
    ratio = query.shape[1] // groups
    out = torch.empty_like(query)
    for token in range(query.shape[0]):
        position = int(position_of[token])
        seen = torch.arange(0 if window is None else max(0, position + 1 - window), position + 1)
        blocks, offsets = block_table[sequence_of[token]][seen // page], seen % page
        for head in range(query.shape[1]):
            keys = key_cache[blocks, offsets, head // ratio].double()
            values = value_cache[blocks, offsets, head // ratio].double()
            scores = keys @ query[token, head].double() * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores if sinks is None else torch.cat((scores, sinks[head : head + 1].double()))
            weights = torch.softmax(scores, dim=0)[: len(seen)]
            out[token, head] = (weights @ values).to(query.dtype)
    return out
