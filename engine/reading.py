"""One reading of a model's or an adapter's directory: what is parsed is what was hashed.

    Reading(directory) ▶ bytes and streams, each hashed on its way into our own memory ▶ digests, once nothing has moved

A file is read, never mapped: whoever writes to a file that is mapped writes into the model that is served, unseen, and
a private mapping protects only the pages that this process wrote to. So a digest is that of the bytes that are served,
whatever happens to the files. That they are also of one version, and not some of the one before, is seen by what the
file system says of each: to the end, every name must be the file that it was when the reading began, unwritten since,
and what was absent must be absent. Times are as fine as the file system keeps them: a file that is rewritten within a
tick of having been written may pass, under the digest of what was read, which then no version has.

Knows neither weights nor what the files say.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from engine.config import EngineStartError

PIECE = 1 << 20  # bytes that are read and then hashed, while they are in the processor's cache

# A file's name, bytes read of it, bytes it has: told when it is opened and after every piece.
Progress = Callable[[str, int, int], None]
Identity = tuple[int, ...]  # device, inode, size, last written, last changed


class WeightsError(EngineStartError):
    """A file of the directory is missing, unreadable, changed meanwhile, or not what the configuration says."""


class EndsEarly(WeightsError):
    """A file has fewer bytes than it says."""


def silently(name: str, done: int, size: int) -> None:
    """Tell nobody."""


class Stream:
    """A file from front to back, hashed as it goes."""

    def __init__(self, name: str, file: BinaryIO, size: int, progress: Progress) -> None:
        self.name = name
        self.size = size  # bytes, when it was opened
        self.position = 0  # bytes, read and hashed
        self._file = file
        self._hash = hashlib.sha256()
        self._progress = progress
        progress(name, 0, size)

    def fill(self, target: memoryview) -> None:
        """Read as many bytes as `target` has. Raises EndsEarly."""
        while target:
            count = self._file.readinto(target[:PIECE])  # type: ignore[attr-defined]  # of an unbuffered file
            if not count:
                raise EndsEarly(f"`{self.name}` ends before what it says it holds")
            self._hash.update(target[:count])
            self.position += count
            target = target[count:]
            self._progress(self.name, self.position, self.size)

    def take(self, count: int) -> bytes:
        """Read `count` bytes. Raises EndsEarly."""
        if count > self.size - self.position:  # before memory is made for them
            raise EndsEarly(f"`{self.name}` ends before what it says it holds")
        taken = bytearray(count)
        self.fill(memoryview(taken))
        return bytes(taken)

    def skip_rest(self) -> None:
        """Hash what is left without keeping it."""
        piece = memoryview(bytearray(min(PIECE, self.size - self.position)))
        while self.position < self.size:
            self.fill(piece[: self.size - self.position])

    @property
    def digest(self) -> str:
        """Of the bytes read so far."""
        return "sha256:" + self._hash.hexdigest()


class Files(ABC):
    """Small files by name, and what they say."""

    called = "the model directory"  # in messages

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether there is a file of that name."""

    @abstractmethod
    def whole(self, name: str) -> bytes:
        """Return a file whole. Raises WeightsError."""

    def text(self, name: str) -> str:
        """Return a file of UTF-8, its lines ended as Python's text files end them. Raises WeightsError."""
        try:
            text = self.whole(name).decode()
        except UnicodeDecodeError as error:
            raise self._unreadable(name) from error
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON object. Raises WeightsError."""
        try:
            value = json.loads(self.whole(name))
        except (ValueError, RecursionError) as error:
            raise self._unreadable(name) from error
        if not isinstance(value, dict):
            raise WeightsError(f"`{name}` of {self.called} is not an object")
        return value

    def _unreadable(self, name: str) -> WeightsError:
        return WeightsError(f"`{name}` of {self.called} cannot be read")


class KeptFiles(Files):
    """Files that were read, to be parsed once more, elsewhere: the same bytes, without another reading."""

    def __init__(self, texts: dict[str, bytes]) -> None:
        self._texts = texts

    def has(self, name: str) -> bool:
        return name in self._texts

    def whole(self, name: str) -> bytes:
        if name not in self._texts:
            raise WeightsError(f"`{name}` is missing in {self.called}")
        return self._texts[name]


class Reading(Files):
    """The files of a directory as they are when this is made, or a refusal."""

    def __init__(
        self,
        directory: Path,
        progress: Progress = silently,
        called: str = "the model directory",  # in messages
    ) -> None:
        self.directory = directory.resolve()  # a link that is led elsewhere later leads nowhere new
        self._progress = progress
        self.called = called
        self._found = _files(self.directory)  # by name, at the beginning
        self._asked: set[str] = set()  # names that something depends on
        self._texts: dict[str, bytes] = {}
        self._digests: dict[str, str] = {}

    def has(self, name: str) -> bool:
        self._asked.add(name)
        return name in self._found

    def whole(self, name: str) -> bytes:
        if name not in self._texts:
            with self.stream(name) as stream:
                self._texts[name] = stream.take(stream.size)
        return self._texts[name]

    def size(self, name: str) -> int:
        """Return how many bytes a file has; 0 where there is none."""
        return self._found[name][2] if self.has(name) else 0

    def kept(self) -> KeptFiles:
        """Return the files that were read whole."""
        return KeptFiles(dict(self._texts))

    @contextmanager
    def stream(self, name: str) -> Iterator[Stream]:
        """Open a file to be read to its end; what is left of it when the block is left is hashed too.

        Raises:
            WeightsError: it is missing, cannot be read, or is not what it was at the beginning.
        """
        if not self.has(name):
            raise WeightsError(f"`{name}` is missing in {self.called}")
        try:
            with open(self.directory / name, "rb", buffering=0, opener=_opened) as file:
                self._refuse_changed(name, _identity(os.fstat(file.fileno())))
                stream = Stream(name, file, os.fstat(file.fileno()).st_size, self._progress)
                yield stream
                stream.skip_rest()
                self._refuse_changed(name, _identity(os.fstat(file.fileno())))
        except (WeightsError, OSError) as error:
            self._refuse_changed(name, _identity_at(self.directory / name))  # the better reason for what was read
            if isinstance(error, OSError):
                raise self._unreadable(name) from error
            raise
        if self._digests.setdefault(name, stream.digest) != stream.digest:
            raise _changed(name)

    def digest(self, name: str) -> str:
        """Return `sha256:…` of a file: of what was read of it, or is read now. Raises WeightsError."""
        if name not in self._digests:
            with self.stream(name):
                pass
        return self._digests[name]

    def verify_unchanged(self) -> None:
        """Raises WeightsError: a file that was asked for is not what it was at the beginning."""
        for name in sorted(self._asked):
            self._refuse_changed(name, _identity_at(self.directory / name))

    def _refuse_changed(self, name: str, identity: Identity | None) -> None:
        if identity != self._found.get(name):
            raise _changed(name)


def _files(directory: Path) -> dict[str, Identity]:
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return {}  # every file will be missing, by name
    found = {name: _identity_at(directory / name) for name in names}
    return {name: identity for name, identity in found.items() if identity is not None}


def _changed(name: str) -> WeightsError:
    return WeightsError(f"`{name}` was changed while it was read; start again when all files are in place")


def _opened(path: str, flags: int) -> int:
    """Open without waiting for anybody: what is a pipe by now is told from a file afterwards."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _identity_at(path: Path) -> Identity | None:
    """Return what a name leads to; None: to no file."""
    try:
        return _identity(path.stat())
    except OSError:
        return None


def _identity(found: os.stat_result) -> Identity | None:
    if not stat.S_ISREG(found.st_mode):
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
