"""A process whose files may not grow beyond a limit: it appends until its log dies, and prints what it saw.

Prints: how many records were confirmed, the error that ended it, how often death was told, the error of a later append.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from audit.log import AuditLog
from audit.records import Record, RecordType
from audit.writer import LogUnavailable
from tests.support.audit_log import TENANT, log_settings

RECORD = Record(RecordType.AUDIT_READ, TENANT, {"reason": "x" * 4_000})


def main(url: str, directory: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    told: list[str] = []
    log = AuditLog.open(log_settings(url, Path(directory)), on_death=told.append)
    confirmed, error = 0, ""
    while not error:
        try:
            log.append_blocking(RECORD)
            confirmed += 1
        except LogUnavailable as failed:
            error = type(failed).__name__
    print(confirmed, error, len(told), _append(log))


def _append(log: AuditLog) -> str:
    try:
        log.append_blocking(RECORD)
    except LogUnavailable as failed:
        return type(failed).__name__
    return "confirmed"


if __name__ == "__main__":
    main(*sys.argv[1:])
