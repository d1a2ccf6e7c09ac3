"""Parts of a batch that a row is computed in: what is asked of every operation that promises invariance."""

from __future__ import annotations

from collections.abc import Iterator

SIZES = (1, 2, 3, 7, 16, 17, 32, 33, 64, 65, 128, 255, 256, 257, 1024)


def parts(rows: int) -> Iterator[slice]:
    """Yield slices of a batch of `rows`: sizes about every power of two, each at three offsets, the last row's too."""
    for size in SIZES:
        if size < rows:
            yield from (slice(offset, offset + size) for offset in sorted({0, min(5, rows - size), rows - size}))
