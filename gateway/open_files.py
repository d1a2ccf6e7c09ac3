"""Open files: room for as many connections as the settings allow, or a refusal to start.

A server that runs out of them accepts nobody and tells nobody why; so it is made sure of before it listens.
"""

from __future__ import annotations

import resource

BESIDE_CONNECTIONS = 128  # databases, keys, sockets to others, what a worker thread opens


class TooFewFiles(Exception):
    """The process may not open as many files as its connections would take."""


def make_room(connections: int) -> None:
    """Let this process open enough files for so many connections. Raises: TooFewFiles."""
    needed = connections + BESIDE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise TooFewFiles(
            f"`server.max_connections` of {connections} needs {needed} open files, and this process may have {hard}; "
            "raise the limit (`ulimit -n`), or lower the setting"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
