"""The database goes away, at the worst moment: nothing is written twice, nothing confirmed is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from audit.log import AuditLog
from audit.ratchet import Ratchet
from audit.writer import LogDead, LogUnavailable
from tests.support.audit_log import LogPlace, completed, received, request_id, segment, server_place
from tests.support.postgres import PostgresServer
from tests.support.socket_proxy import SocketProxy

R = [request_id(number) for number in range(64)]


@pytest.fixture
def lossy(postgres: PostgresServer, tmp_path: Path) -> Iterator[tuple[LogPlace, SocketProxy]]:
    database = postgres.database()
    proxy = SocketProxy(postgres.socket_directory)
    place = server_place(tmp_path, database)
    through = database.through(proxy.directory)
    yield LogPlace(replace(place.settings, database_url=through, append_timeout_s=30), place.admin_url), proxy
    proxy.close()


def check(place: LogPlace, statuses: dict[str, int]) -> None:
    found = place.rows("SELECT status, count(*) FROM request_index GROUP BY status ORDER BY status")
    assert dict(found) == statuses  # type: ignore[arg-type]
    assert place.rows("SELECT count(*) FROM journal") == [(0,)]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_append_after_lost_connection_keeps_indexes_contiguous(
    lossy: tuple[LogPlace, SocketProxy], when: str
) -> None:
    place, proxy = lossy
    log = place.open()
    for number in range(6):
        await log.append(received(R[number]))
        proxy.cut_at_commit(when)
        await log.journal(segment(R[number], 0, "because"))
        proxy.cut_at_commit(when)
        receipt = await log.append(completed(R[number]))
        assert receipt.writer_seq == 2 * number + 2
    assert proxy.cuts >= 6
    log.close()
    report = place.verify()
    assert report.first_wrong is None
    check(place, {"completed": 6})


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_request_whose_answer_and_database_are_gone_is_closed_behind_its_caller(
    lossy: tuple[LogPlace, SocketProxy], when: str
) -> None:
    place, proxy = lossy
    log = place.open()
    await log.append(received(R[0]))
    appending = asyncio.ensure_future(log.append(received(R[1])))
    proxy.cut_at_commit(when)
    while not proxy.cuts:
        await asyncio.sleep(0.001)
    proxy.down()
    with pytest.raises(LogUnavailable):
        await appending
    with pytest.raises(LogUnavailable):
        await log.append(received(R[2]))
    proxy.up()
    await log.append(completed(R[0]))
    await log.append(received(R[3]))
    await log.append(completed(R[3]))
    log.close()
    assert place.verify().first_wrong is None
    statuses = dict(place.rows("SELECT request_id, status FROM request_index"))  # type: ignore[arg-type]
    assert statuses.get(R[1]) in ({"before": {None}, "after": {"interrupted", None}}[when])
    assert (statuses[R[0]], statuses[R[3]]) == ("completed", "completed")


async def test_a_fenced_writer_is_never_heard_again(lossy: tuple[LogPlace, SocketProxy]) -> None:
    place, _ = lossy
    told: list[str] = []
    log = AuditLog.open(place.settings, create=True, on_death=told.append)
    await log.append(received(R[0]))
    with place.admin() as server:
        server.execute("UPDATE writer SET ended = 1")
    with pytest.raises(LogDead, match="fenced"):
        await log.journal(segment(R[0], 0, "too late"))
    with pytest.raises(LogDead, match="fenced"):
        await log.append(completed(R[0]))
    log.close()
    assert told == ["this writer was fenced by another; restart the process"]
    place.open().close()
    assert place.verify().first_wrong is None
    check(place, {"interrupted": 1})


async def test_a_living_gateway_closes_what_a_dead_one_left_open(lossy: tuple[LogPlace, SocketProxy]) -> None:
    place, _ = lossy
    living = place.open(lease_s=3)
    other = LogPlace(replace(place.settings, ratchet=place.settings.ratchet.with_name("other")), place.admin_url)
    Ratchet.create(other.settings.ratchet)
    dying = other.open(lease_s=3)
    await dying.append(received(R[0]))
    await living.append(received(R[1]))
    dying._release()
    deadline = time.monotonic() + 20
    while place.rows(f"SELECT status FROM request_index WHERE request_id = '{R[0]}'") != [("interrupted",)]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await living.append(completed(R[1]))
    living.close()
    assert place.verify().first_wrong is None


async def test_a_server_killed_under_load_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    server = PostgresServer()
    try:
        place = server_place(tmp_path, server.database())
        log = place.open()
        confirmed: set[str] = set()

        async def one(number: int) -> None:
            await log.append(received(R[number]))
            for sequence in range(5):
                await log.journal(segment(R[number], sequence, "word "))
            await log.append(completed(R[number]))
            confirmed.add(R[number])

        requests = [asyncio.ensure_future(one(number)) for number in range(len(R))]
        while not confirmed:
            await asyncio.sleep(0)
        server.kill()
        await asyncio.gather(*requests, return_exceptions=True)
        await asyncio.to_thread(server.start)
        log.close()
        place.open().close()
        assert place.verify().first_wrong is None
        statuses = dict(place.rows("SELECT request_id, status FROM request_index"))  # type: ignore[arg-type]
        assert all(statuses[request] == "completed" for request in confirmed)
        assert set(statuses.values()) <= {"completed", "interrupted"}
    finally:
        server.stop()
