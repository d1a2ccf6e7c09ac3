"""Small files that must survive a crash whole: written beside, synced, renamed, and the directory synced.

Knows nothing of what is in them. POSIX rename is atomic within one file system; without the directory's own fsync the
new name may be lost with the power.
"""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

PRIVATE = 0o600
PUBLIC = 0o644


def exposed(path: Path) -> str | None:
    """Return what to say of a file that gives anything to group or others, and what to do; None where it does not, or
    is not there."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None
    if not mode & ~PRIVATE & 0o777:
        return None
    return f"`{path.name}` has mode {mode:04o}; see who has read it, then run `chmod 600 {path.name}`"


def replace_file(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Make `path` hold `content`, durably: after a crash it holds the old content or the new, whole.

    Raises:
        OSError: it could not be written; the old content stands. A failed fsync must not be retried.
    """
    # Named by the thread, whose number no other on this machine has: two logs of one process may share a trust file.
    beside = path.with_name(f".{path.name}.{threading.get_native_id()}.new")
    with suppress(OSError):
        beside.unlink()  # of a crash, whose thread had our number
    try:
        write_new_file(beside, content, mode)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_directory(path.parent)


def write_new_file(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write and sync a file that must not exist yet; its directory is not synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
