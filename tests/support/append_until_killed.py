"""A process that appends until it is killed, and says on standard output what was confirmed to it.

    python -m tests.support.append_until_killed DATABASE_URL DIRECTORY FIRST

`DIRECTORY` holds keys, key store and ratchet. Sixteen requests at a time, each a line for what is durable:

    R <request>             received
    S <request> <text>      a segment
    C <request>             completed
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from pathlib import Path

from audit.log import AuditLog
from tests.support.audit_log import LogPlace, completed, log_settings, received, request_id, segment

LEASE_S = 0.5


def main(url: str, directory: str, first: str) -> None:
    log = LogPlace(log_settings(url, Path(directory)), url).open(lease_s=LEASE_S)
    asyncio.run(_append(log, int(first)))


async def _append(log: AuditLog, first: int) -> None:
    numbers = itertools.count(first)
    await asyncio.gather(*(_stream(log, numbers) for _ in range(16)))


async def _stream(log: AuditLog, numbers: itertools.count[int]) -> None:
    for number in numbers:
        request = request_id(number)
        await log.append(received(request, f"tenant-{number % 3}"))
        _say("R", request)
        words = []
        for sequence in range(number % 7):
            words.append(f"{number}-{sequence};")
            await log.journal(segment(request, sequence, words[-1], f"tenant-{number % 3}"))
            _say("S", request, words[-1])
        await log.append(completed(request, f"tenant-{number % 3}", ["".join(words)]))
        _say("C", request)


def _say(*words: str) -> None:
    os.write(1, f"{' '.join(words)}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
