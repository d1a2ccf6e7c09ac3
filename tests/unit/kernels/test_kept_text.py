"""Compiled kernels are kept as they were written, for those who wrote them, and found only while all is the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.kept_text import MOST, KeptText

ROOT = Path(__file__).parents[3]
TEXT = "; ModuleID = 'k'\ndefine void @k() {\n  ret void\n}\n"


@pytest.fixture
def kept(tmp_path: Path) -> KeptText:
    return KeptText(tmp_path / "cache" / "kernels")


def _file(tmp_path: Path, name: str = "k") -> Path:
    return tmp_path / "cache" / "kernels" / f"{name}.ll"


def test_a_text_is_read_as_it_was_kept_and_nobody_else_may(kept: KeptText, tmp_path: Path) -> None:
    assert kept.read("k") is None
    kept.keep("k", TEXT)
    assert kept.read("k") == TEXT
    assert kept.read("other") is None
    assert _file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert _file(tmp_path).parent.stat().st_mode & 0o777 == 0o700


def test_a_text_that_was_cut_short_or_changed_anywhere_is_not_read(kept: KeptText, tmp_path: Path) -> None:
    kept.keep("k", TEXT)
    whole = _file(tmp_path).read_bytes()
    for length in range(len(whole)):
        _file(tmp_path).write_bytes(whole[:length])
        assert kept.read("k") is None
    for place in range(len(whole)):
        _file(tmp_path).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert kept.read("k") is None
    _file(tmp_path).write_bytes(b"\xff" * 100)
    assert kept.read("k") is None
    kept.keep("k", TEXT)
    assert kept.read("k") == TEXT


def test_a_text_that_was_put_under_another_name_is_not_read(kept: KeptText, tmp_path: Path) -> None:
    kept.keep("k", TEXT)
    _file(tmp_path).rename(_file(tmp_path, "other"))
    assert kept.read("other") is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_text_that_others_may_write_is_not_run(
    kept: KeptText, tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept.keep("k", TEXT)
    _file(tmp_path).chmod(mode)
    assert kept.read("k") is None
    assert "others may write" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_text_that_another_user_wrote_is_not_run(kept: KeptText, tmp_path: Path) -> None:
    kept.keep("k", TEXT)
    os.chown(_file(tmp_path), 12345, -1)
    assert kept.read("k") is None


def test_where_nothing_can_be_kept_a_warning_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    kept = KeptText(tmp_path / "file" / "kernels")
    with caplog.at_level(logging.WARNING):
        kept.keep("k", TEXT)
    assert "set `XDG_CACHE_HOME`" in caplog.text
    assert kept.read("k") is None


def test_the_oldest_texts_and_halves_of_files_make_room(kept: KeptText, tmp_path: Path) -> None:
    kept.keep("first", TEXT)
    half = _file(tmp_path).parent / "tmp1234"
    half.touch()
    for old in (half, _file(tmp_path, "first")):
        os.utime(old, (1, 1))
    for number in range(MOST):
        kept.keep(f"k{number}", TEXT)
        os.utime(_file(tmp_path, f"k{number}"), (1000 + number,) * 2)
    assert len(list(half.parent.iterdir())) == MOST
    assert not half.exists()
    assert kept.read("first") is None
    assert all(kept.read(f"k{number}") == TEXT for number in range(MOST))
    kept.keep("one more", TEXT)
    assert kept.read("k0") is None
    assert kept.read("k1") == TEXT


PROGRAM = """
import ctypes, sys
from pathlib import Path
from kernels.compilation import compiled
from kernels.kept_text import KeptText
from kernels.lanes import integer_at, put_integer

def made(added):
    def add(data):
        put_integer(data, integer_at(data) + added)
    return add

for added in (1, 2):
    cell = ctypes.c_int64(40)
    kernel = compiled(made(added), KeptText(Path(sys.argv[1])))
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernel)(ctypes.addressof(cell))
    print(cell.value)
"""


def test_a_kernel_that_was_kept_does_the_same_and_one_of_another_text_is_written_anew(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    directory, program = tmp_path / "kernels", tmp_path / "program.py"

    def run() -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(program), str(directory)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert ended.stderr == ""
        return ended.stdout.split()

    program.write_text(PROGRAM)
    assert run() == ["41", "42"]
    written = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert len(written) == 2
    assert run() == ["41", "42"]
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == written
    program.write_text(PROGRAM.replace("+ added", "- added"))
    assert run() == ["39", "38"]
    assert len(list(directory.iterdir())) == 4


def test_a_kernel_that_encloses_more_than_integers_is_refused() -> None:
    pytest.importorskip("numba")
    from kernels.compilation import compiled

    factor = 1.5

    def kernel(data: int) -> None:
        factor.is_integer()

    with pytest.raises(TypeError, match="factor"):
        compiled(kernel)
