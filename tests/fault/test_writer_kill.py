"""SIGKILL at any moment: what was confirmed is on record, everything received is closed once, and `verify` passes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from audit.content import SealedPart, open_part
from audit.leaf import Leaf
from audit.log import AuditLog
from tests.support.append_until_killed import LEASE_S
from tests.support.audit_log import LogPlace

KILLS = 6
ROOT = Path(__file__).parents[2]


def run_and_kill(place: LogPlace, directory: Path, first: int, lines: int) -> list[str]:
    """Start the process, kill it once it said `lines` lines, and return all it said."""
    command = [sys.executable, "-m", "tests.support.append_until_killed", place.settings.database_url, str(directory)]
    with subprocess.Popen([*command, str(first)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        rest = process.stdout.read()
    assert all(said), "the process ended by itself"
    return [line.decode() for line in (b"".join(said) + rest).split(b"\n")[:-1]]


def outputs(place: LogPlace, log: AuditLog) -> dict[str, str]:
    """Return the text on record of every closed request."""
    found = {}
    for raw, part, nonce, ciphertext, key_id in place.rows(
        "SELECT bytes, part, nonce, ciphertext, key_id FROM leaf JOIN content USING (record_id) "
        "WHERE type IN ('request.completed', 'request.interrupted') AND part = 'output'"
    ):
        leaf = Leaf.parse(bytes(raw))  # type: ignore[call-overload]
        commitment = next(entry for entry in leaf.parts if entry.name == part)
        tenant = leaf.log.rpartition("/")[2]
        key = log.keyring.encryption.unwrap(tenant, log.keystore.get(str(key_id)).wrapped)
        sealed = SealedPart(
            bytes.fromhex(commitment.com),
            bytes.fromhex(commitment.ct),
            bytes(nonce),  # type: ignore[call-overload]
            bytes(ciphertext),  # type: ignore[call-overload]
        )
        found[str(leaf.request)] = "".join(json.loads(open_part(key, tenant, leaf.record, "output", sealed).plaintext))
    return found


def wait_until_closed(place: LogPlace) -> None:
    """A process that lives closes, on PostgreSQL once the leases of the dead ran out."""
    deadline = time.monotonic() + 60 * LEASE_S
    while place.rows("SELECT 1 FROM request_index WHERE status = 'received' LIMIT 1"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_confirmed_is_lost_when_the_writer_is_killed(place: LogPlace, tmp_path: Path) -> None:
    chance = random.Random(20261120)
    said: list[str] = []
    for kill in range(KILLS):
        said += run_and_kill(place, tmp_path, kill * 100_000, chance.randrange(1, 600))
    log = place.open(lease_s=LEASE_S)
    try:
        wait_until_closed(place)
        on_record = outputs(place, log)
    finally:
        log.close()

    report = place.verify()
    assert report.first_wrong is None
    assert sum(entry.open_requests for entry in report.logs) == 0
    # What the killed writer had appended and not numbered yet is numbered, too.
    assert all(entry.leaves == entry.signed_size and not entry.unnumbered for entry in report.logs)
    assert place.rows("SELECT count(*) FROM journal") == [(0,)]
    heard: dict[str, str] = defaultdict(str)
    for line in said:
        kind, request, *text = line.split(" ")
        heard[request] += text[0] if kind == "S" else ""
    assert heard
    for request, text in heard.items():
        assert on_record[request].startswith(text)
    statuses = dict(place.rows("SELECT request_id, status FROM request_index"))  # type: ignore[arg-type]
    assert all(statuses[line.split(" ")[1]] == "completed" for line in said if line.startswith("C"))
