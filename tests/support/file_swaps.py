"""What may be done to a file while it is read: each takes the path and what the file is to hold instead."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

Swap = Callable[[Path, bytes], None]


def rename_over(path: Path, other: bytes) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(other)
    beside.replace(path)


def rewrite_in_place(path: Path, other: bytes) -> None:
    with path.open("r+b") as file:
        file.write(other)
        file.truncate()


def flip_the_last_bit(path: Path, other: bytes) -> None:
    whole = path.read_bytes()
    rewrite_in_place(path, whole[:-1] + bytes([whole[-1] ^ 1]))


def cut_short(path: Path, other: bytes) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path, other: bytes) -> None:
    with path.open("ab") as file:
        file.write(other)


def remove(path: Path, other: bytes) -> None:
    path.unlink()


def lead_elsewhere(path: Path, other: bytes) -> None:
    """Of a name that is a link, as in a cache of downloads; of any other, make one of it."""
    elsewhere = path.with_name(f"{path.name}.elsewhere")
    elsewhere.write_bytes(other)
    path.unlink()
    path.symlink_to(elsewhere)


SWAPS: tuple[Swap, ...] = (
    rename_over,
    rewrite_in_place,
    flip_the_last_bit,
    cut_short,
    grow,
    remove,
    lead_elsewhere,
)


def aged_copy(source: Path, target: Path) -> Path:
    """Copy a directory, its files written long ago: what is written from now on shows, however coarse the clock."""
    shutil.copytree(source, target, symlinks=True)
    for path in target.iterdir():
        os.utime(path, ns=(0, 0))
    return target


NEVER = 10**9


class At:
    """A `Progress` that does something the n-th time it is told, from 0."""

    def __init__(self, moment: int = NEVER, act: Callable[[], object] = object) -> None:
        self.told: list[tuple[str, int, int]] = []
        self._moment = moment
        self._act = act

    def __call__(self, name: str, done: int, size: int) -> None:
        if len(self.told) == self._moment:
            self._act()
        self.told.append((name, done, size))
