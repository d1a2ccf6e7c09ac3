"""The ratchet: the last checkpoint signed per log, outside the database and never restored from a backup.

A database that was rolled back, or whose tail was cut off, is smaller than what was once signed; one that was rewritten
has another root at that size. Both are caught at start, and the gateway refuses to write to it. The file is the signed
notes themselves, so that they can be handed to an auditor, a line of JSON a log, under a header that counts them:

    probity/ratchet/v1 1
    {"note":"probity.example/acme-bank\\n8\\nXcna…\\n\\n— probity.example/acme-bank mBPD…\\n","origin":"probity.exam…"}

Its place must be one the database's administrator cannot write to. The checkpoint is ratcheted before the note is
published and after the leaves are durable: then the database can never be rightly behind. Owned by one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from audit.checkpoint import Checkpoint, read_checkpoint
from audit.durable import exposed, replace_file

# RatchetError             catch this; the log must not be written to
# ├── RatchetMissing       there is no file: it was never created, or it was removed
# ├── RatchetUnreadable    the file is not what we wrote
# ├── RatchetExposed       others than its owner may read or write the file
# ├── RatchetBehind        the file is older than what the database says was signed: it was restored or emptied
# ├── RatchetAhead         the database is behind what was signed: restored from a backup, or cut off
# └── RatchetDiverged      the database holds another history than what was signed


class RatchetError(Exception):
    """The log and the last signed checkpoint do not agree."""


class RatchetMissing(RatchetError):
    """The ratchet file does not exist."""


class RatchetUnreadable(RatchetError):
    """The ratchet file is not what was written."""


class RatchetExposed(RatchetError):
    """Others than its owner may read or write the ratchet file."""


class RatchetBehind(RatchetError):
    """The ratchet file is older than the newest published checkpoint."""


class RatchetAhead(RatchetError):
    """The database is behind the ratchet."""


class RatchetDiverged(RatchetError):
    """The database holds another history than the ratchet."""


HEADER = "probity/ratchet/v1"


class Ratchet:
    def __init__(self, path: Path, notes: dict[str, str]) -> None:
        self._path = path
        self._notes = notes
        self._held = {origin: read_checkpoint(note) for origin, note in notes.items()}

    @classmethod
    def create(cls, path: Path) -> Ratchet:
        """Write an empty ratchet, mode 0600. Only for a log that is being opened for the first time.

        Raises:
            RatchetError: there is one already.
        """
        if path.exists():
            raise RatchetError(f"`{path.name}` exists; a ratchet is created once and never reset")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, _encode({}))
        return cls(path, {})

    @classmethod
    def load(cls, path: Path) -> Ratchet:
        """Read the ratchet.

        Raises:
            RatchetMissing: no such file.
            RatchetUnreadable: it is not what was written.
        """
        try:
            content = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise RatchetMissing(f"`{path.name}` is missing; put it back, or run verify before a new one") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RatchetUnreadable(f"`{path.name}` cannot be read") from error
        try:
            ratchet = cls(path, _decode(content))
        except (ValueError, KeyError, TypeError) as error:
            raise RatchetUnreadable(f"`{path.name}` does not hold signed checkpoints; put it back") from error
        if _encode(ratchet._notes).decode() != content or any(o != c.origin for o, c in ratchet._held.items()):
            raise RatchetUnreadable(f"`{path.name}` is cut off or was edited; put it back")
        return ratchet

    @classmethod
    def load_own(cls, path: Path) -> Ratchet:
        """`load` for the gateway that keeps it; an auditor's copy may lie open. Raises: RatchetExposed, as well."""
        told = exposed(path)
        if told is not None:
            raise RatchetExposed(told)
        return cls.load(path)

    @property
    def origins(self) -> tuple[str, ...]:
        """Return the logs that were ever signed: a database without one of them is behind."""
        return tuple(sorted(self._held))

    def last(self, origin: str) -> Checkpoint | None:
        """Return the last signed checkpoint of a log, or None if none was."""
        return self._held.get(origin)

    def note(self, origin: str) -> str | None:
        """Return it as the signed note."""
        return self._notes.get(origin)

    def check(self, origin: str, size: int, root_at: Callable[[int], bytes]) -> None:
        """Return if the log of `size` leaves extends what was last signed.

        `root_at(n)` is the root of the log's first n leaves, computed from what is in the database now; it is asked
        for one n at most, 1 ≤ n ≤ size.

        Raises:
            RatchetAhead: the log is smaller.
            RatchetDiverged: it has another root at the signed size.
        """
        held = self._held.get(origin)
        if held is None or held.size == 0:
            return
        if size < held.size:
            raise RatchetAhead(
                f"database behind the ratchet: `{origin}` has {size} leaves, and {held.size} were signed; "
                "do not write to it, find the missing leaves"
            )
        if root_at(held.size) != held.root:
            raise RatchetDiverged(f"`{origin}` has another root at {held.size} leaves than was signed; run verify")

    def check_not_behind(self, origin: str, published: int) -> None:
        """Raise RatchetBehind unless the checkpoint of `published` leaves was ratcheted before it was published."""
        held = self._held.get(origin)
        if held is None or held.size < published:
            raise RatchetBehind(f"the ratchet knows less of `{origin}` than was published; put the last one back")

    def advance(self, notes: Iterable[str]) -> None:
        """Hold these signed checkpoints from now on, durably; several logs cost one write.

        Raises:
            RatchetAhead, RatchetDiverged: one goes back, or contradicts what was signed. Nothing is written.
            OSError: it could not be made durable. The checkpoints must not be published.
        """
        held, held_notes = dict(self._held), dict(self._notes)
        for note in notes:
            checkpoint = read_checkpoint(note)
            _check_forward(held.get(checkpoint.origin), checkpoint)
            held[checkpoint.origin], held_notes[checkpoint.origin] = checkpoint, note
        if held_notes != self._notes:
            replace_file(self._path, _encode(held_notes))
            self._held, self._notes = held, held_notes


def _check_forward(held: Checkpoint | None, new: Checkpoint) -> None:
    if held is None:
        return
    if new.size < held.size:
        raise RatchetAhead(f"a checkpoint of `{new.origin}` with {new.size} leaves follows one with {held.size}")
    if new.size == held.size and new.root != held.root:
        raise RatchetDiverged(f"two checkpoints of `{new.origin}` with {new.size} leaves have different roots")


def _encode(notes: dict[str, str]) -> bytes:
    lines = [json.dumps({"note": notes[origin], "origin": origin}, separators=(",", ":")) for origin in sorted(notes)]
    return "".join(f"{line}\n" for line in (f"{HEADER} {len(notes)}", *lines)).encode()


def _decode(content: str) -> dict[str, str]:
    entries = [json.loads(line) for line in content.split("\n")[1:-1]]
    return {entry["origin"]: entry["note"] for entry in entries}
