"""The law of a batch: a row has the same bits alone, at any place, and among any number of others.

Numbers of rows and places lie about the heights of tiles and where 2,048 rows end. On a GPU it is the arithmetic that
is held to the law; in the interpreter order and indexing are, which no width changes, so that there rows are as narrow
as they can be. It takes milliseconds for a program: sizes are tried at one place each, and a batch of 2,048 once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kernels.jit import INTERPRETED

MOST_ROWS = 2048
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # whose rounding the interpreter walks through, too
EDGES = (1, 16, 32, 64, 128, 256, 512, 1024)  # where tiles of some height end, or are filled
SIZES = (2, 17, 65, 255, 256, 257) if INTERPRETED else (
    2, 3, 7, 16, 17, 32, 33, 64, 65, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2047
)  # fmt: skip


def alone(rows: int) -> list[int]:
    """Return the rows to look at by themselves: the first, the last, and those on either side of every edge."""
    beside = {edge + side for edge in EDGES for side in (-1, 0) if edge + side < rows}
    return sorted({0, rows - 1} | beside)


def parts(rows: int) -> Iterator[slice]:
    """Yield slices of a batch of `rows`: single rows, and sizes about every power of two at its beginning, within, and
    at its end; in the interpreter each at one of these, in turn."""
    yield from (slice(row, row + 1) for row in alone(rows))
    for turn, size in enumerate(size for size in SIZES if size < rows):
        offsets = (0, min(5, rows - size), rows - size)
        chosen = offsets[turn % 3 :][:1] if INTERPRETED else offsets
        yield from (slice(offset, offset + size) for offset in chosen)


def assert_rows_are_their_own(compute: Callable[[slice], Sequence[Tensor]], rows: int = MOST_ROWS) -> None:
    """Compare what is computed for every part of a batch, byte for byte, with what is computed for the whole of it.

    `compute` takes the part and returns tensors that have its rows; it lays them where nothing of the others stands.
    """
    whole = compute(slice(0, rows))
    for part in parts(rows):
        for found, expected in zip(compute(part), whole, strict=True):
            assert torch.equal(bytes_of(found), bytes_of(expected[part])), f"rows {part.start} … {part.stop - 1}"


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
