"""Small files that hold the old content or the new, whole."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from audit.durable import PUBLIC, replace_file, write_new_file


def test_a_file_is_replaced_with_its_mode_and_nothing_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0)
    try:
        replace_file(path, b"old", PUBLIC)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        replace_file(path, b"new")
    finally:
        os.umask(before)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_that_holds_the_old_file_keeps_the_whole_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old" * 1000)
    with path.open("rb") as reader:
        replace_file(path, b"new")
        assert reader.read() == b"old" * 1000


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    # Somebody's leftover is in the way of the new file: nothing is written over.
    in_the_way = tmp_path / f".file.{threading.get_native_id()}.new"
    in_the_way.mkdir()
    with pytest.raises(OSError, match="exists"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_leftover_of_a_crash_does_not_stop_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / f".file.{threading.get_native_id()}.new").write_bytes(b"half")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_replace_one_file_do_not_take_each_others_drafts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    together = threading.Barrier(4)

    def write(number: int) -> None:
        together.wait()
        for _ in range(50):
            replace_file(path, bytes([number]) * 1000)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert path.read_bytes() in {bytes([number]) * 1000 for number in range(4)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_never_follows_a_link_or_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(target)
    for name in ("target", "link"):
        with pytest.raises(FileExistsError):
            write_new_file(tmp_path / name, b"new")
    assert target.read_bytes() == b"precious"
