"""The processes that this one started."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def children() -> set[int]:
    """Return the ids of those that are not buried yet."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found
