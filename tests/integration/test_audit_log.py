"""The log on both databases: what it takes, what it refuses, and what it leaves durable."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError

from audit.content import SealedPart, open_part
from audit.database import DatabaseOutdated, DatabaseRefused
from audit.journal import TOKENS_BEHIND
from audit.keys import KeyFileMissing
from audit.leaf import Leaf
from audit.log import AuditLog
from audit.ratchet import Ratchet, RatchetMissing
from audit.reader import AuditReader
from audit.records import SYSTEM, Json, Record, RecordType, Segment
from audit.writer import (
    BUSY,
    MAX_QUEUED,
    AlreadyClosed,
    DiskLow,
    LogBusy,
    LogUnavailable,
    RecordMalformed,
    RecordTooLarge,
)
from tests.support.audit_log import (
    ORIGIN,
    TENANT,
    LogPlace,
    completed,
    denied,
    embedded_place,
    received,
    request_id,
    segment,
    server_place,
)
from tests.support.postgres import PostgresServer

R = [request_id(number) for number in range(64)]


async def test_a_request_is_two_leaves_a_row_and_no_journal(place: LogPlace) -> None:
    log = place.open()
    first = await log.append(received(R[0]))
    await log.journal(segment(R[0], 0, "because."))
    second = await log.append(completed(R[0]))
    log.close()
    assert (first.origin, first.writer_seq, second.writer_seq) == (f"{ORIGIN}/{TENANT}", 1, 2)  # 0 is log.opened
    assert place.rows("SELECT count(*) FROM journal") == [(0,)]
    assert place.rows("SELECT status, tenant, prompt_tokens, completion_tokens FROM request_index") == [
        ("completed", TENANT, 7, 3)
    ]
    assert place.verify().first_wrong is None


async def test_a_denial_stands_alone(place: LogPlace) -> None:
    log = place.open()
    await log.append(denied(R[0]))
    with pytest.raises(AlreadyClosed):
        await log.append(completed(R[0]))
    log.close()
    assert place.rows("SELECT status, effect, code FROM request_index") == [("denied", "deny", "policy_denied")]
    assert place.verify().first_wrong is None


async def test_the_content_opens_with_the_stored_key_and_nothing_else_shows_it(place: LogPlace) -> None:
    log = place.open()
    await log.append(received(R[0], prompt=b"a canary sings"))
    key = log.keyring.encryption.unwrap(TENANT, log.keystore.get(place.key_id(R[0])).wrapped)
    log.close()
    ((leaf_bytes,),) = place.rows("SELECT bytes FROM leaf WHERE type = 'request.received'")
    leaf = Leaf.parse(bytes(leaf_bytes))  # type: ignore[call-overload]
    com = {part.name: (bytes.fromhex(part.com), bytes.fromhex(part.ct)) for part in leaf.parts}
    parts = {
        str(name): open_part(key, TENANT, leaf.record, str(name), SealedPart(*com[str(name)], bytes(n), bytes(c)))  # type: ignore[call-overload]
        for name, n, c in place.rows("SELECT part, nonce, ciphertext FROM content")
    }
    assert parts["prompt"].plaintext == b"a canary sings"
    assert parts["identities"].plaintext == b'{"source":"10.2.3.4","subject":"mia@acme.example"}'
    everything = str([place.rows(f"SELECT * FROM {table}") for table in ("leaf", "content", "request_index", "head")])
    assert "canary" not in everything
    assert "mia@" not in everything


async def test_concurrent_requests_of_many_tenants_share_transactions_and_keep_their_chains(place: LogPlace) -> None:
    log = place.open()

    async def one(number: int) -> None:
        tenant = f"tenant-{number % 5}"
        await log.append(received(R[number], tenant))
        await log.journal(segment(R[number], 0, "a", tenant))
        await log.append(completed(R[number], tenant))

    await asyncio.gather(*map(one, range(64)))
    log.close()
    report = place.verify()
    assert report.first_wrong is None
    assert sum(entry.leaves for entry in report.logs if not entry.log.endswith(SYSTEM)) == 64 * 2 + 5
    assert all(entry.leaves == entry.signed_size and not entry.unnumbered for entry in report.logs)


async def test_a_request_given_up_in_the_turn_it_was_appended_in_is_closed_behind_its_record(place: LogPlace) -> None:
    log = place.open()
    appending = asyncio.ensure_future(log.append(received(R[0])))
    await asyncio.sleep(0)  # appended; its turn ends with the cancelling
    appending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await appending
    await log.append(received(R[1]))
    log.close()
    statuses = place.rows("SELECT request_id, status FROM request_index ORDER BY request_id")
    assert statuses == [(R[0], "interrupted"), (R[1], "received")]
    assert place.verify().first_wrong is None


async def test_a_busy_writer_keeps_its_rhythm(place: LogPlace) -> None:
    log = place.open(rhythm_s=1.0)
    sizes: list[int] = []

    def count(connection: Connection) -> None:
        sizes.append(connection.execute(text("SELECT count(*) FROM leaf")).scalar_one())

    event.listen(log.database.writer, "commit", count)
    await asyncio.gather(*(log.append(received(R[number])) for number in range(BUSY)))
    sizes.clear()
    appending = []
    for number in range(BUSY, BUSY + 8):  # in turns of their own, while the writer rests
        appending.append(asyncio.ensure_future(log.append(received(R[number]))))
        await asyncio.sleep(0.01)
    await asyncio.gather(*appending)
    assert len(set(sizes)) <= 2  # one batch, and one more where the machine stood still
    log.close()
    assert place.verify().first_wrong is None


async def test_a_rhythm_holds_up_no_lone_record(place: LogPlace) -> None:
    log = place.open(rhythm_s=3600.0)
    for number in range(8):
        await log.append(received(R[number]))
    log.close()
    assert place.verify().first_wrong is None


def test_what_a_loop_appended_in_its_last_turn_is_written_all_the_same(place: LogPlace) -> None:
    log = place.open()
    loop = asyncio.new_event_loop()
    appending = loop.create_task(log.append(received(R[0])))
    loop.call_soon(loop.stop)
    loop.run_forever()
    log.close()
    loop.run_until_complete(appending)
    loop.close()
    assert place.rows("SELECT request_id, status FROM request_index") == [(R[0], "received")]


@pytest.mark.parametrize("again", [completed(R[0]), received(R[0])])
async def test_a_request_is_received_once_and_closed_once(place: LogPlace, again: Record) -> None:
    log = place.open()
    await log.append(received(R[0]))
    if again.type is not RecordType.REQUEST_RECEIVED:
        await log.append(completed(R[0]))
    with pytest.raises((AlreadyClosed, RecordMalformed)):
        await log.append(again)
    await log.append(received(R[1]))
    log.close()
    assert place.verify().first_wrong is None


async def test_a_segment_of_a_closed_request_is_refused(place: LogPlace) -> None:
    log = place.open()
    await log.append(received(R[0]))
    await log.append(completed(R[0]))
    with pytest.raises(AlreadyClosed):
        await log.journal(segment(R[0], 0, "late"))
    log.close()


BODY: dict[str, Json] = {"reason": "because"}
WRONG = [
    Record(RecordType.REQUEST_RECEIVED, TENANT, {}, R[9]),  # lacks the body of its type
    Record(RecordType.REQUEST_RECEIVED, TENANT, BODY),  # belongs to no request
    Record(RecordType.REQUEST_COMPLETED, TENANT, BODY),
    Record(RecordType.AUDIT_READ, "ten\0ant", BODY),
    Record(RecordType.AUDIT_READ, "t" * 300, BODY),
    Record(RecordType.AUDIT_READ, TENANT, BODY, "r" * 37),
    Record(RecordType.AUDIT_READ, TENANT, BODY, parts={"no such name": b""}),
    Record(RecordType.AUDIT_READ, TENANT, {"a": 1.5}),  # type: ignore[dict-item]
    Record(RecordType.AUDIT_READ, TENANT, {"a": "\ud800"}),
    Record(RecordType.AUDIT_READ, TENANT, {"a": "x" * 65_536}),
    Record(RecordType.AUDIT_READ, TENANT, BODY, identities={"subject": "\ud800"}),
    replace(received(R[9]), body={**received(R[9]).body, "action": "a" * 41}),
    replace(received(R[9]), body={**received(R[9]).body, "action": "a\0"}),
    received(R[9], "ten\ud800ant"),
]


async def test_a_wrong_record_is_refused_alone(place: LogPlace) -> None:
    """Those that wait in the same batch are stored, and the writer lives on."""
    log = place.open()
    results = await asyncio.gather(
        *(log.append(record) for pair in zip(WRONG, map(received, R), strict=False) for record in pair),
        return_exceptions=True,
    )
    await log.append(received(R[63]))
    log.close()
    assert [type(result) for result in results[0::2]] == [
        RecordTooLarge if index in (7, 8, 9, 10) else RecordMalformed for index in range(len(WRONG))
    ]
    assert not any(isinstance(result, BaseException) for result in results[1::2])
    assert place.rows("SELECT count(*) FROM leaf WHERE type = 'request.received'") == [(len(WRONG) + 1,)]
    assert place.verify().first_wrong is None


# --- within ---


class Unfit(Exception):
    pass


def refuse(connection: Connection) -> None:
    connection.execute(text("UPDATE writer SET started = 0"))
    raise Unfit


def break_a_rule(connection: Connection) -> None:
    connection.execute(text("INSERT INTO writer (id) VALUES (NULL)"))


@pytest.mark.parametrize(("within", "raised"), [(refuse, Unfit), (break_a_rule, DBAPIError)])
async def test_what_within_raises_reaches_its_caller_and_undoes_only_its_record(
    place: LogPlace, within: object, raised: type[Exception]
) -> None:
    log = place.open()
    change = Record(RecordType.POLICY_ACTIVATED, TENANT, BODY)
    results = await asyncio.gather(
        log.append(received(R[0])),
        log.append(change, within=within),  # type: ignore[arg-type]
        log.append(received(R[1])),
        return_exceptions=True,
    )
    assert [isinstance(result, BaseException) for result in results] == [False, True, False]
    assert isinstance(results[1], raised)
    await log.append(change, within=lambda connection: None)
    log.close()
    assert place.rows("SELECT count(*) FROM leaf WHERE type = 'policy.activated'") == [(1,)]
    assert place.rows("SELECT count(*) FROM writer WHERE started = 0") == [(0,)]
    assert place.verify().first_wrong is None


# --- recovery ---


async def left_open(place: LogPlace) -> AuditLog:
    """A log whose process ended without a word: three requests are open, one of them spoke."""
    log = place.open(lease_s=0.05)
    for number in range(3):
        await log.append(received(R[number]))
    for sequence, (choice, said) in enumerate([(1, "zwei"), (0, "grü"), (0, "ß Gott 🙂"), (1, "!")]):
        await log.journal(segment(R[1], sequence, said, choice=choice))
    await log.append(completed(R[2]))
    return log


def outputs(place: LogPlace, log: AuditLog) -> list[bytes]:
    found = []
    for leaf_bytes, nonce, ciphertext, key_id in place.rows(
        "SELECT bytes, nonce, ciphertext, key_id FROM leaf JOIN content USING (record_id) "
        "WHERE type = 'request.interrupted' AND part = 'output' ORDER BY request_id"
    ):
        leaf = Leaf.parse(bytes(leaf_bytes))  # type: ignore[call-overload]
        key = log.keyring.encryption.unwrap(TENANT, log.keystore.get(str(key_id)).wrapped)
        sealed = SealedPart(
            *(bytes.fromhex(value) for value in (leaf.parts[0].com, leaf.parts[0].ct)),
            bytes(nonce),  # type: ignore[call-overload]
            bytes(ciphertext),  # type: ignore[call-overload]
        )
        found.append(open_part(key, TENANT, leaf.record, "output", sealed).plaintext)
    return found


async def test_what_a_writer_left_open_is_closed_with_exactly_what_was_durable(place: LogPlace) -> None:
    (await left_open(place))._release()  # no writer.stopped; the fault tests do it with SIGKILL
    log = place.open()
    try:
        assert outputs(place, log) == [b"[]", '["grüß Gott 🙂","zwei!"]'.encode()]
    finally:
        log.close()
    assert place.rows("SELECT count(*) FROM journal") == [(0,)]
    assert place.rows("SELECT status, count(*) FROM request_index GROUP BY status ORDER BY status") == [
        ("completed", 1),
        ("interrupted", 2),
    ]
    report = place.verify()
    assert report.first_wrong is None
    assert sum(entry.open_requests for entry in report.logs) == 0


async def test_what_was_told_of_tokens_is_closed_with_the_text_it_left_with(place: LogPlace) -> None:
    log = place.open()
    await log.append(received(R[0]))
    for sequence, (said, told) in enumerate(
        [("é", b"[[1,-0.5,[[1,-0.5],[7,-2.25]]]]"), ("b", b""), ("c", b"[[3,-1.5,[]]]")]
    ):
        data = said.encode() + (TOKENS_BEHIND + told if told else b"")
        await log.journal(Segment(TENANT, R[0], 0, sequence, data))
    log._release()
    log = place.open()
    try:
        content = AuditReader(log.database.reader, log.keyring, log.keystore).reveal(R[0])
    finally:
        log.close()
    assert json.loads(content.output or b"") == ["ébc"]
    assert json.loads(content.logprobs or b"") == {"choices": [[[1, -0.5, [[1, -0.5], [7, -2.25]]], [3, -1.5, []]]]}


# --- what is refused, by name ---


async def test_below_the_low_water_mark_only_what_is_open_goes_on(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    log = place.open()
    await log.append(received(R[0]))
    log.close()
    log = place.open(low_water_bytes=1 << 62)
    with pytest.raises(DiskLow):
        await log.append(received(R[1]))
    await log.append(Record(RecordType.AUDIT_READ, TENANT, BODY))
    assert log.health().disk_low
    log.close()


async def test_a_full_queue_refuses_by_name(tmp_path: Path) -> None:
    log = embedded_place(tmp_path).open()
    with log.database.writer.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the writer waits
        record = Record(RecordType.AUDIT_READ, TENANT, BODY)
        reads = [asyncio.ensure_future(log.append(record)) for _ in range(MAX_QUEUED + 600)]
        for _ in range(3):
            await asyncio.sleep(0)
        refused = [read.exception() for read in reads if read.done()]
    assert refused
    assert all(isinstance(error, LogBusy) for error in refused)
    await asyncio.gather(*reads, return_exceptions=True)
    log.close()


def test_a_closed_log_refuses(place: LogPlace) -> None:
    log = place.open()
    log.close()
    with pytest.raises(LogUnavailable, match="closed"):
        log.append_blocking(received(R[0]))


def test_a_database_that_was_not_migrated_is_refused(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(DatabaseOutdated, match="probity db upgrade"):
        LogPlace(replace(place.settings, database_url=f"sqlite:///{tmp_path}/empty.db"), "").open()


def test_a_server_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    url = f"postgresql+psycopg://gateway@/nowhere?host={tmp_path}"
    with pytest.raises(DatabaseRefused, match="does not answer"):
        LogPlace(replace(place.settings, database_url=url), "").open()


def test_a_log_without_its_ratchet_or_a_key_is_refused(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    place.open().close()
    held = place.settings.ratchet.read_bytes()
    place.settings.ratchet.unlink()
    with pytest.raises(RatchetMissing):
        place.open()
    place.settings.ratchet.write_bytes(held)
    (place.settings.keys / "master.key").unlink()
    with pytest.raises(KeyFileMissing, match=r"`master\.key` is missing"):
        place.open()


# --- several gateways, one PostgreSQL ---


async def test_gateways_that_share_a_database_share_the_logs_and_number_each_leaf_once(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    first = server_place(tmp_path, postgres.database())
    logs = [first.open()]
    for number in (1, 2):
        other = replace(first.settings, ratchet=tmp_path / f"ratchet-{number}")
        Ratchet.create(other.ratchet)
        logs.append(AuditLog.open(other))

    async def one(number: int) -> None:
        log = logs[number % 3]
        tenant = f"tenant-{number % 4}"  # opened by all of them at once, in different orders
        await log.append(received(request_id(number), tenant))
        await log.journal(segment(request_id(number), 0, "a", tenant))
        await log.append(completed(request_id(number), tenant))

    await asyncio.gather(*map(one, range(600)))
    for log in logs:
        log.close()
    report = first.verify()
    assert report.first_wrong is None
    assert all(entry.leaves == entry.signed_size and not entry.unnumbered for entry in report.logs)
    assert first.rows("SELECT count(*) FROM leaf WHERE type LIKE 'request.%'") == [(1_200,)]
    assert first.rows("SELECT DISTINCT status FROM request_index") == [("completed",)]
