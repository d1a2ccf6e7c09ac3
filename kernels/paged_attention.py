"""Attention over the paged cache: causal, grouped heads, every row's bits independent of everything else.

Numeric contract. The keys of a sequence are walked in tiles of 64 and segments of 256, both at *absolute* positions.
Within a segment a one-pass softmax state (m, l, o) is updated tile by tile; segments are merged in ascending order.
Queries are packed into tiles of 16 rows, (token, head of the group) by (token, head), so that a decode step's one token
and a prefill's many go through products of one shape, [16, D]·[D, 64] and [16, 64]·[64, D], in float32. A tile that is
masked for a row leaves its state as it is, exactly. Hence prefill == decode == chunked == cache hit, in bits.

This is the reference that the Triton kernels of a later issue must equal in order, and what the CPU runs.
Source: Kwon et al., SOSP 2023 (block tables); Milakov and Gimelshein, 2018 (one-pass softmax); Dao et al., 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.shape import ShapeError, check_shape

TILE = 64  # keys
SEGMENT = 256  # keys, a multiple of TILE
ROWS = 16  # query rows a tile
MAX_ITEMS = 4_096  # products of one batch: bounds the memory of a long prefill

State = tuple[Tensor, Tensor, Tensor]  # m [n, G, R, 1] running maximum, l [n, G, R, 1] sum, o [n, G, R, D] weighted sum


def paged_attention(
    query: Tensor,  # [T, H, D]
    key_cache: Tensor,  # [N, P, G, D]  P divides TILE
    value_cache: Tensor,  # [N, P, G, D]
    block_table: Tensor,  # [S, M] int64  block ids; entries beyond a sequence's context are never read
    sequence_of: Tensor,  # [T] int64  which sequence each token belongs to
    position_of: Tensor,  # [T] int64  its absolute position; its own key is stored already
    scale: float,  # multiplies query·key before softmax
) -> Tensor:  # [T, H, D]
    """Return the attention of each token over the keys at positions ≤ its own.

    Token t reads the blocks that hold positions 0 … position_of[t] of its own sequence and nothing else of the pool.

    Raises:
        ShapeError: an argument disagrees with the shapes above, H is not a multiple of G, or P does not divide 64.

    Cost: one pass over the keys and values of each sequence for every 16 rows (token, head of a group).
    """
    tokens, heads, size = query.shape
    page, groups = key_cache.shape[1], key_cache.shape[2]
    check_shape("value_cache", value_cache, *key_cache.shape)
    check_shape("sequence_of", sequence_of, tokens)
    check_shape("position_of", position_of, tokens)
    if heads % groups or key_cache.shape[3] != size or TILE % page or heads // groups > ROWS:
        raise ShapeError(f"{heads} heads of {size} do not fit a cache of {list(key_cache.shape)}")
    tiles = _pack(query, groups, sequence_of, position_of)
    out = torch.empty_like(tiles.rows)
    step = max(1, MAX_ITEMS // groups)
    for begin in range(0, tiles.rows.shape[0], step):
        part = slice(begin, begin + step)
        out[part] = _attend(
            tiles.rows[part], tiles.positions[part], block_table[tiles.sequence[part]], key_cache, value_cache, scale
        )
    return _unpack(out, tiles, heads).to(query.dtype)


class _Tiles:
    """Query rows in tiles of 16: each tile holds consecutive tokens of one sequence."""

    def __init__(self, rows: Tensor, positions: Tensor, sequence: Tensor, place: Tensor) -> None:
        self.rows = rows  # [n, G, R, D] float32
        self.positions = positions  # [n, R]  −1 for padding: it attends to nothing
        self.sequence = sequence  # [n]
        self.place = place  # [T]  tile · tokens per tile + offset, of each token


def _pack(query: Tensor, groups: int, sequence_of: Tensor, position_of: Tensor) -> _Tiles:
    tokens, heads, size = query.shape
    ratio = heads // groups
    per_tile = ROWS // ratio
    # A tile begins where the sequence changes, and after every `per_tile` tokens of one sequence.
    index = torch.arange(tokens)
    begins = torch.ones(tokens, dtype=torch.bool)
    begins[1:] = sequence_of[1:] != sequence_of[:-1]
    first = torch.where(begins, index, 0).cummax(0).values
    offset = index - first
    tile = ((offset % per_tile == 0).long().cumsum(0)) - 1
    place = tile * per_tile + offset % per_tile
    count = int(tile[-1]) + 1
    rows = torch.zeros(count * per_tile, groups, ratio, size)
    rows[place] = query.view(tokens, groups, ratio, size).float()
    positions = torch.full((count * per_tile,), -1)
    positions[place] = position_of
    sequence = torch.zeros(count, dtype=torch.long)
    sequence[tile] = sequence_of
    packed = rows.view(count, per_tile, groups, ratio, size).transpose(1, 2).reshape(count, groups, -1, size)
    wide = positions.view(count, per_tile).repeat_interleave(ratio, dim=1)
    missing = ROWS - per_tile * ratio
    if missing:
        packed = torch.nn.functional.pad(packed, (0, 0, 0, missing))
        wide = torch.nn.functional.pad(wide, (0, missing), value=-1)
    return _Tiles(packed.contiguous(), wide, sequence, place)


def _unpack(out: Tensor, tiles: _Tiles, heads: int) -> Tensor:
    count, groups, _, size = out.shape
    ratio = heads // groups
    per_tile = ROWS // ratio
    by_token = out[:, :, : per_tile * ratio].reshape(count, groups, per_tile, ratio, size).transpose(1, 2)
    return by_token.reshape(count * per_tile, heads, size)[tiles.place]


def _attend(
    rows: Tensor,  # [n, G, R, D] float32
    positions: Tensor,  # [n, R]
    table: Tensor,  # [n, M]
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
) -> Tensor:  # [n, G, R, D] float32
    last = positions.amax(dim=1)  # [n] the last key that any row of the tile may see
    total = _empty(rows)
    for segment in range(0, int(last.max()) + 1, SEGMENT):
        seen = (last >= segment).nonzero().squeeze(1)
        state = _empty(rows[seen])
        for start in range(segment, min(segment + SEGMENT, int(last.max()) + 1), TILE):
            within = last[seen] >= start
            some = seen[within]
            keys = _gather(key_cache, table[some], start)
            values = _gather(value_cache, table[some], start)
            visible = positions[some][:, None, :, None] >= torch.arange(start, start + TILE)
            updated = _update(tuple(part[within] for part in state), rows[some], keys, values, visible, scale)  # type: ignore[arg-type]
            for part, new in zip(state, updated, strict=True):
                part[within] = new
        merged = merge_state(tuple(part[seen] for part in total), state)  # type: ignore[arg-type]
        for part, new in zip(total, merged, strict=True):
            part[seen] = new
    _, sums, weighted = total
    return weighted / torch.where(sums == 0, 1.0, sums)  # a padding row saw nothing


def _empty(rows: Tensor) -> State:
    narrow = rows[..., :1]
    return torch.full_like(narrow, -torch.inf), torch.zeros_like(narrow), torch.zeros_like(rows)


def _gather(cache: Tensor, table: Tensor, start: int) -> Tensor:
    """Return the 64 cached rows from position `start` on, [n, G, 64, D] float32."""
    page, groups, size = cache.shape[1:]
    blocks = table[:, start // page : (start + TILE) // page]
    blocks = torch.nn.functional.pad(blocks, (0, TILE // page - blocks.shape[1]))  # beyond the table: masked below
    return cache[blocks].view(len(table), TILE, groups, size).transpose(1, 2).float()


def _update(state: State, rows: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> State:
    """Return the state after one tile of keys."""
    n, groups, _, size = rows.shape
    scores = torch.bmm(rows.reshape(-1, ROWS, size), keys.reshape(-1, TILE, size).transpose(1, 2))
    scores = (scores.view(n, groups, ROWS, TILE) * scale).masked_fill(~visible, -torch.inf)
    maximum, sums, weighted = state
    new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
    shift = _finite(new_maximum)
    weights = torch.exp(scores - shift)
    decay = torch.exp(maximum - shift)
    # What a masked slot holds, NaN included, must not reach the sum: 0 · NaN is not 0.
    seen_values = values.masked_fill(~visible.any(dim=2)[..., None], 0.0)
    product = torch.bmm(weights.view(-1, ROWS, TILE), seen_values.reshape(-1, TILE, size)).view_as(rows)
    return new_maximum, sums * decay + weights.sum(dim=-1, keepdim=True), weighted * decay + product


def merge_state(left: State, right: State) -> State:
    """Return the state over the keys of both; `left` holds the earlier ones. An empty side changes no bit."""
    maximum = torch.maximum(left[0], right[0])
    shift = _finite(maximum)
    before, after = torch.exp(left[0] - shift), torch.exp(right[0] - shift)
    return maximum, left[1] * before + right[1] * after, left[2] * before + right[2] * after


def _finite(maximum: Tensor) -> Tensor:
    """Where nothing was seen yet, shift by 0 instead of −∞, whose difference with itself is NaN."""
    return torch.where(torch.isneginf(maximum), 0.0, maximum)


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    sequence_of: Tensor,
    position_of: Tensor,
    scale: float,
) -> Tensor:
    """Return the same, one token and head at a time, in float64."""
    page, groups = key_cache.shape[1], key_cache.shape[2]
    ratio = query.shape[1] // groups
    out = torch.empty_like(query)
    for token in range(query.shape[0]):
        seen = torch.arange(int(position_of[token]) + 1)
        blocks, offsets = block_table[sequence_of[token]][seen // page], seen % page
        for head in range(query.shape[1]):
            keys = key_cache[blocks, offsets, head // ratio].double()
            values = value_cache[blocks, offsets, head // ratio].double()
            weights = torch.softmax(keys @ query[token, head].double() * scale, dim=0)
            out[token, head] = (weights @ values).to(query.dtype)
    return out
