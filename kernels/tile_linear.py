"""Linear by tiles: x·Wᵀ + b in bfloat16, the weight laid out once, every tile of it read once.

By the matrix tiles of AMX where the CPU has them, else by its products of pairs, a few rows at a time.

Numeric contract. An element of the result is one chain: K is walked in ascending order, 32 numbers at a time or two,
into one float32; the bias is added to it, if there is one, and the sum is rounded to bfloat16. No instruction mixes
rows, so that a row has the same bits in whatever tile it stands, beside whatever, at every number of rows, and
whichever thread computes it. K and N of any size are padded with zeros, which are laid out with the weight; rows that
fill a tile up are zero, too, and thrown away.

A weight lies as the tiles want it, in panels of 32 rows of it, zero beyond the last:

    [N / 32, K / 32, 2, 16, 16, 2]  panel, chunk of K, tile of the panel, pair of K, row of the tile, which of the pair

so that a product of few rows reads one stream, from its first byte to its last. Rows of `x` are laid out likewise in
every call, as many at a time as the second cache holds, and all panels go by them.

Measured with torch 2.13, one thread, weights from memory, on a machine that others used as well, its figures moving by
a factor of two with where memory lay: a step of 24 layers, 896 wide, took 0.73 to 0.84 of that with packed_linear.py
for 32 sequences, and 0.65 to 0.78 for a prompt of 512 tokens; most products alone 0.6 to 0.9. A product of 256 x 688 at
512 rows took 1.0 to 1.3: few panels go by rows that take long to lay out. Up to 128 rows it took 0.7 to 1.05.

By pairs, on a CPU without AMX (Zen 5), by bench_linear: of the time of packed_linear.py 0.72 to 1.07 for one row or
two, the greatest weights taking most, 0.63 to 0.87 for 8 and 32, 0.86 to 1.1 for 128 and 512.

Threads share out the panels. Imported only where numba is; see engine/models/compiled.py.

Source: Intel, Optimization Reference Manual, 2024, chapter 20 (AMX); Goto and van de Geijn, 2008 (panels).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.compilation import compiled, part
from kernels.lane_silu_mul import lane_silu_mul, silu_times
from kernels.lanes import (
    MOST_ROWS,
    SHAPES_BYTES,
    TILES,
    add_products,
    claim,
    copy_half,
    copy_sixteen,
    fill,
    give_tiles_back,
    has_pairs,
    integer_at,
    plus,
    prefetch,
    put_halves,
    put_integer,
    put_sixteen,
    put_tile,
    rounded,
    sixteen_at,
    sixteen_halves_at,
    take_tiles,
    tile_at,
    tile_product,
    tile_zero,
)
from kernels.shape import ShapeError, check_layout, check_product
from kernels.team import COME, GIVEN, TAKEN, run, scratch, shares, threads_for

ROWS = 16  # of a tile
DEPTH = 32  # numbers of K in a row of a tile
PAIRS = DEPTH // 2
TILE = 1024  # bytes
PANEL = 32  # rows of the weight
PAIR = 2 * ROWS  # rows of `x` that a tile of the weight is read once for
HELD = 1 << 20  # bytes of `x` laid out at a time, about: the second cache keeps them beside two panels
LINE = 64  # bytes of a cache's line
AHEAD = 5 << 12  # bytes of the weight, for products of pairs: the CPU alone keeps too few on their way
NEAR = 8  # chunks of a panel that the first cache keeps, beside 32 rows of `x`, for products of pairs

_ZERO = np.float32(0)

# Eight whole tiles.
_TILE_BYTES = 64 << 48 | 64 << 32 | 64 << 16 | 64  # of a row, of four
_TILE_ROWS = 16 << 56 | 16 << 48 | 16 << 40 | 16 << 32 | 16 << 24 | 16 << 16 | 16 << 8 | 16

# A thread's workspace, in bytes from its beginning.
_SHAPES = 0
_BIAS = _SHAPES + SHAPES_BYTES  # of a panel that is not full: 32 bfloat16
_ROW = _BIAS + 64  # of such a one's result
_SUMS = _ROW + 64  # 32 rows of 32 float32; of a gate, then, as many of what it opens for
_SUMS_BYTES = PAIR * PANEL * 4
_LAID_OUT = _SUMS + 2 * _SUMS_BYTES

# What the kernel is given: items, panels of an item, the threads' workspaces and the bytes of each; addresses of x, the
# weight, bias or 0, out; M, N, K, rows of `x` laid out at a time, and whether the N rows of the weight are gates, of as
# many rows that follow: 1 or 0.
_ITEMS, _TOGETHER, _SPACE, _SPACE_BYTES = range(GIVEN, GIVEN + 32, 8)
_X, _WEIGHT, _ADDED, _OUT = range(GIVEN + 32, GIVEN + 64, 8)
_M, _N, _K, _AT_A_TIME, _GATED = range(GIVEN + 64, GIVEN + 104, 8)


def lay_out(weight: Tensor) -> Tensor:
    """Return a weight [N, K] laid out for `tile_linear`; for nothing else. Its shape remains."""
    if weight.dtype != torch.bfloat16:
        raise ShapeError(f"`weight` holds {weight.dtype}, not {torch.bfloat16}")
    rows, depth = weight.shape
    wide, deep = -(-rows // PANEL) * PANEL, -(-depth // DEPTH) * DEPTH
    padded = weight.new_zeros(wide, deep)
    padded[:rows, :depth] = weight
    tiles = padded.view(wide // PANEL, 2, ROWS, deep // DEPTH, DEPTH // 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(wide, deep)[:rows, :depth]


def tile_linear(
    x: Tensor,  # [M, K] bfloat16  M ≥ 1
    weight: Tensor,  # [N, K] laid out
    bias: Tensor | None = None,  # [N] bfloat16
    tiles: bool = TILES,  # by tiles, which the CPU must have; or by pairs
) -> Tensor:  # [M, N]
    """Return x·weightᵀ + bias.

    Raises:
        ShapeError: an argument disagrees with the shapes or dtypes above.

    Cost: for up to 32 rows, one pass over the weight, at the speed of memory.
    """
    check_product(x, weight, bias)
    x = x.contiguous()
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None:
            check_layout(name, tensor, torch.bfloat16)
    return _run(x, weight, bias, weight.shape[0], gated=False, tiles=tiles)


def tile_silu_mul(
    x: Tensor,  # [M, K] bfloat16  M ≥ 1
    gate_up: Tensor,  # [2I, K] laid out: gate, then up; I ≥ 16
    tiles: bool = TILES,  # as in `tile_linear`
) -> Tensor:  # [M, I]
    """Return silu(x·gateᵀ) · (x·upᵀ): the bits of `lane_silu_mul` of `tile_linear`.

    Where I is a multiple of 32, what is between them is not written to memory.

    Raises:
        ShapeError: an argument disagrees with the shapes or dtypes above.
    """
    if gate_up.shape[0] % (2 * PANEL):
        return lane_silu_mul(tile_linear(x, gate_up, tiles=tiles))
    check_product(x, gate_up)
    x = x.contiguous()
    check_layout("x", x, torch.bfloat16)
    return _run(x, gate_up, None, gate_up.shape[0] // 2, gated=True, tiles=tiles)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, width: int, gated: bool, tiles: bool) -> Tensor:
    rows, depth = x.shape
    row_bytes, panels = -(-depth // DEPTH) * LINE, -(-width // PANEL)
    most = min(max(PAIR, HELD // row_bytes // PAIR * PAIR), -(-rows // PAIR) * PAIR)
    size, threads, together = _LAID_OUT + most * row_bytes, threads_for(panels), shares(panels, 1)
    space = scratch(threads * size)
    out = torch.empty(rows, width, dtype=torch.bfloat16)
    run(
        _kernel(tiles),
        threads,
        -(-rows // most) * -(-panels // together),
        together,
        space,
        size,
        x,
        weight,
        bias,
        out,
        rows,
        width,
        depth,
        most,
        gated,
    )
    return out


@cache
def _kernel(tiles: bool) -> int:
    if not has_pairs():
        raise RuntimeError("this CPU does not multiply pairs of bfloat16; ask `has_pairs` first")
    by_tiles = int(tiles)

    def multiply(data: int) -> None:
        _multiply(data, by_tiles)

    return compiled(multiply)


@part
def _multiply(data: int, tiles: int) -> None:
    """Items are shares of the panels, by the first rows, then by the next; a thread lays out rows when it meets them.

    It may miss some, if others take all the shares.
    """
    at = integer_at(data + _SPACE) + claim(data + COME) * integer_at(data + _SPACE_BYTES)
    rows, width, depth = integer_at(data + _M), integer_at(data + _N), integer_at(data + _K)
    most, together = integer_at(data + _AT_A_TIME), integer_at(data + _TOGETHER)
    chunks, panels = (depth + DEPTH - 1) // DEPTH, (width + PANEL - 1) // PANEL
    parts, next_row = (panels + together - 1) // together, 0
    if tiles:
        take_tiles(at + _SHAPES, _TILE_BYTES, _TILE_BYTES, _TILE_ROWS)
    item = claim(data + TAKEN)
    while item < integer_at(data + _ITEMS):
        first, begin = item // parts * most, item % parts * together
        count = min(most, rows - first)
        if first >= next_row:
            _lay_out_rows(at + _LAID_OUT, integer_at(data + _X) + first * depth * 2, count, depth, chunks)
            next_row = first + count
        for panel in range(begin, min(begin + together, panels)):
            _multiply_panel(at, data, panel, first, count, chunks, tiles)
        item = claim(data + TAKEN)
    if tiles:
        give_tiles_back(at + _SHAPES)


@part
def _lay_out_rows(to: int, x: int, rows: int, depth: int, chunks: int) -> None:
    """[M / 16, K / 32, 16, 32]: tile by tile, zero beyond M and K."""
    for row in range((rows + ROWS - 1) // ROWS * ROWS):
        line = to + row // ROWS * chunks * TILE + row % ROWS * LINE
        whole = depth // DEPTH if row < rows else 0
        source = x + row * depth * 2
        for chunk in range(whole):
            copy_sixteen(line + chunk * TILE, source + chunk * LINE)
            copy_sixteen(line + chunk * TILE + 32, source + chunk * LINE + 32)
        for chunk in range(whole, chunks):
            for word in range(0, LINE, 8):
                put_integer(line + chunk * TILE + word, 0)
        if row < rows:
            _copy(line + whole * TILE, source + whole * LINE, depth % DEPTH)


@part
def _copy(to: int, source: int, count: int) -> None:
    """As many bfloat16, fewer than 32."""
    done = 0
    if count >= 16:
        copy_sixteen(to, source)
        done = 16
    for one in range(done, count):
        copy_half(to + one * 2, source + one * 2)


@part
def _multiply_panel(at: int, data: int, panel: int, first: int, rows: int, chunks: int, tiles: int) -> None:
    """A panel, by the rows that are laid out, which are `x`'s from `first` on."""
    width, bias, panel_bytes = integer_at(data + _N), integer_at(data + _ADDED), chunks * 2 * TILE
    weight, gated = integer_at(data + _WEIGHT) + panel * panel_bytes, integer_at(data + _GATED)
    out, columns = integer_at(data + _OUT) + (first * width + panel * PANEL) * 2, min(PANEL, width - panel * PANEL)
    pairs = (rows + PAIR - 1) // PAIR
    lines = 2 * TILE // LINE // pairs if pairs > 2 else 0  # of the next panel, asked for beside a chunk of this one
    if bias:
        bias += panel * PANEL * 2
        if columns < PANEL:
            _copy(at + _BIAS, bias, columns)
            bias = at + _BIAS
    for pair in range(pairs):
        count, to = min(PAIR, rows - pair * PAIR), out + pair * PAIR * width * 2
        for row in range(count):
            prefetch(to + row * width * 2)
        for side in range(2 if gated else 1):
            from_side = weight + side * (width // PANEL) * panel_bytes
            if tiles:
                _sum(at, from_side, pair, count, chunks, lines, side)
            else:
                _sum_pairs(at, from_side, pair, count, chunks, side)
        for row in range(count):
            sums = at + _SUMS + row * PANEL * 4
            if gated:
                _write_gated(to + row * width * 2, sums)
            else:
                _write(at, to + row * width * 2, sums, bias, columns)


@part
def _sum(at: int, weight: int, pair: int, rows: int, chunks: int, lines: int, side: int) -> None:
    above, sums = at + _LAID_OUT + pair * 2 * chunks * TILE, at + _SUMS + side * _SUMS_BYTES
    wanted = weight + (2 * TILE + pair * lines * LINE) * chunks
    if rows > ROWS:
        _sum_two(sums, above, weight, chunks, wanted, lines)
    else:
        _sum_one(sums, above, weight, chunks, wanted, lines)


@part
def _sum_two(sums: int, above: int, weight: int, chunks: int, wanted: int, lines: int) -> None:
    """Two tiles of rows by the two of a panel."""
    below = above + chunks * TILE
    tile_zero(0)
    tile_zero(1)
    tile_zero(2)
    tile_zero(3)
    for chunk in range(chunks):
        tile_at(6, weight + chunk * 2 * TILE, LINE)
        tile_at(4, above + chunk * TILE, LINE)
        tile_product(0, 4, 6)
        tile_at(7, weight + chunk * 2 * TILE + TILE, LINE)
        tile_product(1, 4, 7)
        tile_at(5, below + chunk * TILE, LINE)
        tile_product(2, 5, 6)
        tile_product(3, 5, 7)
        for line in range(chunk * lines, (chunk + 1) * lines):
            prefetch(wanted + line * LINE)
    put_tile(0, sums, PANEL * 4)
    put_tile(1, sums + 64, PANEL * 4)
    put_tile(2, sums + ROWS * PANEL * 4, PANEL * 4)
    put_tile(3, sums + ROWS * PANEL * 4 + 64, PANEL * 4)


@part
def _sum_one(sums: int, above: int, weight: int, chunks: int, wanted: int, lines: int) -> None:
    """One tile of rows by the two of a panel: of the same products, in the same order, as one of two."""
    tile_zero(0)
    tile_zero(1)
    for chunk in range(chunks):
        tile_at(6, weight + chunk * 2 * TILE, LINE)
        tile_at(4, above + chunk * TILE, LINE)
        tile_product(0, 4, 6)
        tile_at(7, weight + chunk * 2 * TILE + TILE, LINE)
        tile_product(1, 4, 7)
        for line in range(chunk * lines, (chunk + 1) * lines):
            prefetch(wanted + line * LINE)
    put_tile(0, sums, PANEL * 4)
    put_tile(1, sums + 64, PANEL * 4)


@part
def _sum_pairs(at: int, weight: int, pair: int, rows: int, chunks: int, side: int) -> None:
    """What `_sum` does, without tiles: a few rows at a time go by the chunks that are near.

    At least twice, if it is no single row: while the later ones go by chunks that are here, the next are on their way.
    """
    above, sums = at + _LAID_OUT + pair * 2 * chunks * TILE, at + _SUMS + side * _SUMS_BYTES
    for place in range(sums, sums + rows * PANEL * 4, 64):
        put_sixteen(place, fill(_ZERO))
    few = min(MOST_ROWS, (rows + 1) // 2)
    for chunk in range(0, chunks, NEAR):
        for row in range(0, rows, few):
            add_products(
                2,
                PAIRS,
                AHEAD,
                (sums + row * PANEL * 4, PANEL * 4),
                (above + (row // ROWS * chunks + chunk) * TILE + row % ROWS * LINE, LINE, TILE),
                (weight + chunk * 2 * TILE, LINE, 2 * TILE, TILE),
                min(few, rows - row),
                min(NEAR, chunks - chunk),
            )


@part
def _write(at: int, out: int, sums: int, bias: int, columns: int) -> None:
    """A row of a panel."""
    left, right = sixteen_at(sums), sixteen_at(sums + 64)
    if bias:
        left, right = plus(left, sixteen_halves_at(bias)), plus(right, sixteen_halves_at(bias + 32))
    to = out if columns == PANEL else at + _ROW
    put_halves(to, left)
    put_halves(to + 32, right)
    if columns < PANEL:
        _copy(out, to, columns)


@part
def _write_gated(out: int, sums: int) -> None:
    """A row of a panel, of both projections rounded to bfloat16 as if they had been written."""
    ups = sums + _SUMS_BYTES
    put_halves(out, silu_times(rounded(sixteen_at(sums)), rounded(sixteen_at(ups))))
    put_halves(out + 32, silu_times(rounded(sixteen_at(sums + 64)), rounded(sixteen_at(ups + 64))))
