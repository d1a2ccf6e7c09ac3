"""Policy changes on a real log and store: what a record says of the state was true when the change was made."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection

from audit.log import AuditLog
from audit.records import Record, RecordType
from gateway.app import create_app
from gateway.oversight import Officer
from gateway.policy_change import Change, PolicyChanges
from gateway.settings import load_settings
from gateway.state import AppState
from policies.document import FLOOR_TENANT, parse_policy
from policies.request import Principal
from policies.store import PolicyStore, StaleGeneration, StoredVersion, activate, insert_version, state
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import TENANT, activation_record, policy_text

OFFICER = Officer(Principal("iss", "petra@platform.example", "*", frozenset({"policy_approver"}), None, None), None)
NOW = datetime(2026, 11, 20, tzinfo=UTC)
VERSION = "sha256:" + "ab" * 32


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[AppState]:
    settings = load_settings(None, {}, {"data_dir": str(tmp_path), "audit.low_water_mib": 1})
    app = create_app(settings, engine=ScriptedEngine())
    opened: AppState = app.state.probity
    yield opened
    opened.log.close()


class FloorMovesMeanwhile(PolicyStore):
    """A store whose floor is changed by somebody else right after it was read."""

    def __init__(self, rooms: AppState) -> None:
        super().__init__(rooms.log.database.reader)
        self._log = rooms.log

    def version(self, tenant: str, number: int) -> StoredVersion:
        found = super().version(tenant, number)
        if tenant == FLOOR_TENANT:
            raise_floor(self._log, f"floor-{self.state(FLOOR_TENANT).generation}")
        return found


def raise_floor(log: AuditLog, name: str) -> None:
    document = parse_policy(f'api_version: policy/v1\ntenant: "*"\nname: {name}\ndefault: deny\n')

    with log.database.reader.connect() as connection:
        generation = state(connection, FLOOR_TENANT).generation
    number = generation // 2 + 1

    def change(connection: Connection) -> None:
        assert insert_version(connection, document, "test", "test", 0, generation) == number
        activate(connection, FLOOR_TENANT, number, generation + 1)

    log.append_blocking(activation_record(document, number, generation + 2), within=change)


def change(rooms: AppState) -> Change:
    return Change(OFFICER, TENANT, "a review", rooms.policies.state(TENANT).generation)


async def test_a_floor_that_moves_meanwhile_stops_the_activation_and_its_record(rooms: AppState) -> None:
    raise_floor(rooms.log, "first-floor")
    changes = PolicyChanges(rooms.policies, rooms.log, lambda: NOW)
    number = await changes.draft(change(rooms), parse_policy(policy_text(VERSION)))
    before = rooms.policies.state(TENANT)
    late = PolicyChanges(FloorMovesMeanwhile(rooms), rooms.log, lambda: NOW)
    with pytest.raises(StaleGeneration):
        await late.activate(change(rooms), number)
    with pytest.raises(StaleGeneration):
        await late.roll_back(change(rooms), number)
    assert rooms.policies.state(TENANT) == before
    assert rooms.policies.current(TENANT) is None
    effective = await changes.activate(change(rooms), number)
    held = rooms.policies.current(TENANT)
    assert held is not None
    assert held.digest == effective.digest


async def test_a_refused_change_leaves_no_record_and_no_gap(rooms: AppState) -> None:
    changes = PolicyChanges(rooms.policies, rooms.log, lambda: NOW)
    await changes.draft(change(rooms), parse_policy(policy_text(VERSION)))
    stale = Change(OFFICER, TENANT, "too late", 0)
    first = await rooms.log.append(Record(RecordType.ACCESS_CHANGED, TENANT, {"change": "marker"}))
    for _ in range(3):
        with pytest.raises(StaleGeneration):
            await changes.draft(stale, parse_policy(policy_text(VERSION)))
    second = await rooms.log.append(Record(RecordType.ACCESS_CHANGED, TENANT, {"change": "marker"}))
    assert second.writer_seq == first.writer_seq + 1
