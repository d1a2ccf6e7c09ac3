"""The disk is full, or fails: what was confirmed stays, and nothing is confirmed that is not there."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from audit.log import AuditLog
from audit.records import Record, RecordType
from audit.writer import LogDead, LogUnavailable
from tests.support.audit_log import TENANT, LogPlace, completed, embedded_place, limit_pages, received, request_id

ROOT = Path(__file__).parents[2]
READ = Record(RecordType.AUDIT_READ, TENANT, {"reason": "x" * 4_000})


def pages(place: LogPlace) -> int:
    ((count,),) = place.rows("PRAGMA page_count")
    assert isinstance(count, int)
    return count


def append_until_refused(log: AuditLog) -> tuple[int, LogUnavailable]:
    for confirmed in range(1_000):
        try:
            log.append_blocking(READ)
        except LogUnavailable as refused:
            return confirmed, refused
    raise AssertionError("the disk did not fill")


def test_a_full_disk_refuses_and_is_written_to_again_once_there_is_room(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    log = place.open()
    log.append_blocking(received(request_id(0)))
    limit_pages(log, pages(place) + 20)
    confirmed, refused = append_until_refused(log)
    assert not isinstance(refused, LogDead)
    assert log.health().alive
    with pytest.raises(LogUnavailable):
        log.append_blocking(READ)
    limit_pages(log, 1_000_000)
    log.append_blocking(completed(request_id(0)))
    log.close()
    assert place.rows("SELECT count(*) FROM leaf WHERE type = 'audit.read'") == [(confirmed,)]
    assert place.verify().first_wrong is None


def test_a_failed_write_ends_the_log_for_good(tmp_path: Path) -> None:
    """The largest size of a file, reached: SQLite is told of an I/O error, as by a failing disk."""
    place = embedded_place(tmp_path)
    place.open().close()
    command = [
        sys.executable,
        "-m",
        "tests.support.append_until_disk_fails",
        place.settings.database_url,
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=_limit_files)
    assert done.returncode == 0, done.stderr
    confirmed, died, told, later = done.stdout.split()
    assert (died, told, later) == ("LogDead", "1", "LogDead")
    log = place.open()  # the disk was looked at
    log.append_blocking(READ)
    log.close()
    ((stored,),) = place.rows("SELECT count(*) FROM leaf WHERE type = 'audit.read'")
    assert isinstance(stored, int)
    assert stored >= int(confirmed) + 1 > 1
    assert place.verify().first_wrong is None


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
