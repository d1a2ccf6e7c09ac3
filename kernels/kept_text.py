"""The LLVM text of compiled kernels, kept from one start to the next: numba takes seconds to write what this reads.

A text stands under the name of everything that it follows from, so it is never out of date: it is found or it is not.
Its first line is the digest of its name and of the rest; a file that was cut short, changed or put under another name
is written anew.

    ~/.cache/probity/kernels/5b0c…e1.ll, or below `XDG_CACHE_HOME`
        ; sha256:91af…
        ; ModuleID = '_norm'
        …

What lies there will run: only files that this user wrote, and nobody else may write, are read. At most 64 are kept.
Where none can be, kernels are compiled at every start and a warning says so. This file knows no compiler.

Source: freedesktop.org, XDG Base Directory Specification 0.8, 2021.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

MOST = 64  # files

_logger = logging.getLogger(__name__)


class KeptText:
    """The texts of one directory, which need not be there yet. Safe among processes: a file is whole or not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str) -> str | None:
        """Return the text of that name, or None where none is kept, or not as it was written, or not by this user."""
        try:
            with self._path(name).open(encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    _logger.warning("kept kernels are not used: others may write `%s`", self._directory)
                    return None
                first, text = file.readline(), file.read()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            _logger.warning("kept kernels are not used: `%s` cannot be read (%s)", self._directory, _reason(error))
            return None
        return text if first == _first_line(name, text) else None

    def keep(self, name: str, text: str) -> None:
        """Keep a text; where the directory takes none, say so: the kernel is compiled again next time."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room()
            with tempfile.NamedTemporaryFile("w", dir=self._directory, encoding="utf-8", delete=False) as file:
                file.write(_first_line(name, text) + text)
            os.replace(file.name, self._path(name))
        except OSError as error:
            _logger.warning(
                "kernels are compiled at every start: `%s` takes no file (%s); set `XDG_CACHE_HOME` to a directory"
                " that does",
                self._directory,
                _reason(error),
            )

    def _make_room(self) -> None:
        """Take away the oldest files, those of a start that ended while it wrote among them."""
        oldest_first = sorted(self._directory.iterdir(), key=_written)
        for path in oldest_first[: max(0, len(oldest_first) - MOST + 1)]:
            with contextlib.suppress(FileNotFoundError):  # another process took it away
                path.unlink()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.ll"


def kept_by_this_user() -> KeptText:
    """Return the texts of the user whose process this is."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return KeptText(Path(base, "probity", "kernels"))


def _first_line(name: str, text: str) -> str:
    return f"; sha256:{hashlib.sha256(f'{name} {text}'.encode()).hexdigest()}\n"


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process took it away
        return 0.0


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else "it is not text"
