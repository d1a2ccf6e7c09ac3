"""One reading: what is handed out is what was hashed, and of one moment, or it is refused."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import pytest

from engine.reading import PIECE, EndsEarly, Reading, WeightsError
from tests.support.file_swaps import SWAPS, At, Swap, aged_copy

OLD = b'{"old": 1}'
LONG = bytes(range(251)) * (3 * PIECE // 251)  # four pieces, the last one short


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "small.json").write_bytes(OLD)
    (source / "long").write_bytes(LONG)
    return aged_copy(source, tmp_path / "directory")


def read_all(reading: Reading) -> tuple[bytes, bytes]:
    """Read one file whole and the other in odd pieces."""
    small = reading.whole("small.json")
    long = bytearray(len(LONG))
    with reading.stream("long") as stream:
        view = memoryview(long)
        for count in (8, 0, PIECE + 1, 3):
            stream.fill(view[:count])
            view = view[count:]
        stream.fill(view)
    reading.verify_unchanged()
    return small, bytes(long)


def test_what_is_read_is_what_is_hashed_and_progress_is_told(directory: Path) -> None:
    progress = At()
    reading = Reading(directory, progress)
    assert read_all(reading) == (OLD, LONG)
    assert (reading.digest("small.json"), reading.digest("long")) == (sha256(OLD), sha256(LONG))
    assert progress.told[0] == ("small.json", 0, len(OLD))
    assert progress.told[-1] == ("long", len(LONG), len(LONG))
    seen = [done for name, done, _ in progress.told if name == "long"]
    assert seen == sorted(set(seen))  # no byte is read twice
    assert reading.whole("small.json") == OLD


def test_a_file_that_nobody_parses_is_hashed_whole(directory: Path) -> None:
    assert Reading(directory).digest("long") == sha256(LONG)
    reading = Reading(directory)
    with reading.stream("long") as stream:
        assert stream.take(5) == LONG[:5]
    assert reading.digest("long") == sha256(LONG)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("file", ["small.json", "long"])
def test_a_file_that_is_swapped_at_any_moment_is_refused_by_name(
    directory: Path, tmp_path: Path, file: str, swap: Swap
) -> None:
    moments = count_moments(directory)
    assert moments > 8
    for moment in range(moments):
        victim = aged_copy(directory, tmp_path / f"{moment}")
        progress = At(moment, partial(swap, victim / file, b"other" * 100))
        with pytest.raises(WeightsError, match=f"`{file}` was changed"):
            read_all(Reading(victim, progress))
        assert len(progress.told) > moment


def count_moments(directory: Path) -> int:
    progress = At()
    read_all(Reading(directory, progress))
    return len(progress.told)


def test_a_link_that_is_led_elsewhere_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    """As a cache of downloads has it: names are links to the files."""
    blobs = tmp_path / "blobs"
    (directory / "long").rename(blobs)
    (directory / "long").symlink_to(blobs)
    assert read_all(Reading(directory)) == (OLD, LONG)

    def lead_elsewhere() -> None:
        other = tmp_path / "other"
        other.write_bytes(LONG[::-1])
        (directory / "long").unlink()
        (directory / "long").symlink_to(other)

    with pytest.raises(WeightsError, match="`long` was changed"):
        read_all(Reading(directory, At(3, lead_elsewhere)))


def test_a_directory_link_that_is_led_elsewhere_leads_nowhere_new(directory: Path, tmp_path: Path) -> None:
    """As a deployment has it: `current` is switched to the next version as a whole."""
    following = aged_copy(directory, tmp_path / "next")
    (following / "small.json").write_bytes(b'{"new": 1}')
    (following / "long").write_bytes(LONG[::-1])
    for moment in range(count_moments(directory)):
        current = tmp_path / f"current-{moment}"
        current.symlink_to(directory)

        def switch(current: Path = current) -> None:
            current.unlink()
            current.symlink_to(following)

        reading = Reading(current, At(moment, switch))
        assert read_all(reading) == (OLD, LONG)
        assert reading.digest("long") == sha256(LONG)
        assert Reading(current).whole("small.json") == b'{"new": 1}'


def test_a_file_that_was_not_there_and_came_is_refused_by_name(directory: Path) -> None:
    reading = Reading(directory)
    assert not reading.has("late")
    (directory / "late").write_bytes(b"")
    assert not reading.has("late")
    with pytest.raises(WeightsError, match="`late` was changed"):
        reading.verify_unchanged()


def test_a_digest_is_that_of_the_bytes_even_where_times_are_put_back(directory: Path) -> None:
    """Who may set a file's times can rewrite it unseen within one tick of the clock: not so under its old digest."""
    path = directory / "long"

    def forge() -> None:
        with path.open("r+b") as file:
            file.write(LONG[::-1])
        os.utime(path, ns=(0, 0))

    for moment in range(2, count_moments(directory)):
        reading = Reading(directory, At(moment, forge))
        try:
            _, long = read_all(reading)
        except WeightsError:
            continue
        assert reading.digest("long") == sha256(long)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"", b"[" * 100_000, b'{"a": \xff}'])
def test_what_is_no_json_is_named(directory: Path, text: bytes) -> None:
    (directory / "small.json").write_bytes(text)
    with pytest.raises(WeightsError, match=r"`small.json` of the model directory cannot be read"):
        Reading(directory).json("small.json")


def test_lines_end_as_in_a_text_file(directory: Path) -> None:
    (directory / "text").write_bytes("ä\r\nb\rc\n".encode())
    assert Reading(directory).text("text") == (directory / "text").read_text(encoding="utf-8")
    (directory / "text").write_bytes(b"\xff")
    with pytest.raises(WeightsError, match=r"`text` of the model directory cannot be read"):
        Reading(directory).text("text")


def test_more_than_a_file_has_is_never_waited_or_made_room_for(directory: Path) -> None:
    reading = Reading(directory)
    with pytest.raises(EndsEarly, match="`long`"), reading.stream("long") as stream:
        stream.take(2**60)
    with pytest.raises(EndsEarly, match="`long`"), reading.stream("long") as stream:
        stream.fill(memoryview(bytearray(len(LONG) + 1)))


def test_what_is_no_file_is_missing_and_a_pipe_is_not_waited_for(directory: Path) -> None:
    (directory / "folder").mkdir()
    os.mkfifo(directory / "pipe")
    (directory / "dangling").symlink_to(directory / "nowhere")
    for name in ("folder", "pipe", "dangling", "absent"):
        with pytest.raises(WeightsError, match=f"`{name}` is missing in the model directory"):
            Reading(directory).whole(name)
    reading = Reading(directory)
    assert reading.has("long")
    (directory / "long").unlink()
    os.mkfifo(directory / "long")
    with pytest.raises(WeightsError, match="`long` was changed"):
        reading.digest("long")
