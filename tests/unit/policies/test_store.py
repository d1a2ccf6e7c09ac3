"""The store: versions that never change, activation against what was seen, and snapshots that cannot go stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import StaticPool

from policies.document import PolicyInvalid, read_document
from policies.store import (
    AlreadySo,
    NoSuchVersion,
    PolicyStore,
    StaleGeneration,
    StoreUnavailable,
    VersionDamaged,
    activate,
    insert_version,
    roll_back,
    set_suspended,
)
from policies.tables import metadata
from tests.support.policies import StandingClock, deny, document_value, floor_value


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def store(engine: Engine) -> PolicyStore:
    return PolicyStore(engine)


def insert(connection: Connection, value: dict[str, Any], generation: int) -> int:
    return insert_version(connection, read_document(value), "author", "because", 1, generation)


def put(engine: Engine, value: dict[str, Any], generation: int = 0) -> int:
    """Store and activate; return the generation after."""
    with engine.begin() as connection:
        number = insert(connection, value, generation)
        activate(connection, value["tenant"], number, generation + 1)
    return generation + 2


def test_nothing_is_active_before_an_activation(engine: Engine, store: PolicyStore) -> None:
    assert store.current("acme") is None
    with engine.begin() as connection:
        assert insert(connection, document_value(), 0) == 1
    store.invalidate("acme")
    assert store.current("acme") is None
    assert store.state("acme").generation == 1


def test_an_activated_version_holds_after_invalidation_and_old_snapshots_stay_whole(
    engine: Engine, store: PolicyStore
) -> None:
    generation = put(engine, document_value())
    first = store.current("acme")
    assert first is not None
    put(engine, document_value(rules=[]), generation)
    assert store.current("acme") is first
    store.invalidate("acme")
    second = store.current("acme")
    assert second is not None
    assert (len(first.document.rules), len(second.document.rules)) == (1, 0)


def test_versions_are_listed_in_order_by_pages(engine: Engine, store: PolicyStore) -> None:
    with engine.begin() as connection:
        for generation in range(5):
            assert insert(connection, document_value(name=f"v{generation}"), generation) == generation + 1
    assert [one.version for one in store.versions("acme", limit=2)] == [1, 2]
    assert [one.document.name for one in store.versions("acme", after=3)] == ["v3", "v4"]
    assert store.version("acme", 2).author == "author"
    with pytest.raises(NoSuchVersion):
        store.version("acme", 6)
    with pytest.raises(NoSuchVersion):
        store.version("globex", 1)


CHANGES: list[Callable[[Connection, int], object]] = [
    lambda connection, generation: insert(connection, document_value(), generation),
    lambda connection, generation: activate(connection, "acme", 1, generation),
    lambda connection, generation: roll_back(connection, "acme", 1, "a", "r", 1, generation),
    lambda connection, generation: set_suspended(connection, "acme", True, generation),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("generation", [0, 1, 3])
def test_a_change_against_another_generation_is_refused(
    engine: Engine, store: PolicyStore, change: Callable[[Connection, int], object], generation: int
) -> None:
    put(engine, document_value())
    with pytest.raises(StaleGeneration), engine.begin() as connection:
        change(connection, generation)
    assert store.state("acme").generation == 2
    assert len(store.versions("acme")) == 1


def test_a_change_whose_transaction_fails_did_not_happen(engine: Engine, store: PolicyStore) -> None:
    put(engine, document_value())

    def change_without_a_record() -> None:
        with engine.begin() as connection:
            number = insert(connection, document_value(rules=[]), 2)
            activate(connection, "acme", number, 3)
            raise RuntimeError("the record of it could not be written")

    with pytest.raises(RuntimeError):
        change_without_a_record()
    assert store.state("acme").active_version == 1
    assert len(store.versions("acme")) == 1


def test_rolling_back_makes_a_new_version_equal_to_the_earlier(engine: Engine, store: PolicyStore) -> None:
    generation = put(engine, document_value())
    generation = put(engine, document_value(rules=[]), generation)
    with engine.begin() as connection:
        assert roll_back(connection, "acme", 1, "ben", "too strict", 7, generation) == 3
    assert store.state("acme").active_version == 3
    assert store.version("acme", 3).digest == store.version("acme", 1).digest != store.version("acme", 2).digest
    assert store.version("acme", 3).author == "ben"


def test_suspending_is_seen_and_is_done_once(engine: Engine, store: PolicyStore) -> None:
    generation = put(engine, document_value())
    assert not store.suspended("acme")
    with engine.begin() as connection:
        set_suspended(connection, "acme", True, generation)
        with pytest.raises(AlreadySo):
            set_suspended(connection, "acme", True, generation + 1)
    store.invalidate("acme")
    assert store.suspended("acme")
    assert store.current("acme") is not None
    assert not store.suspended("globex")


FLOOR = floor_value(params={"org": {"n": {"max": 2}}})
LOOSE = document_value(params={"own": {"n": {"max": 3}}})


def test_a_tenant_that_loosens_is_refused_at_insert(engine: Engine, store: PolicyStore) -> None:
    put(engine, FLOOR)
    with pytest.raises(PolicyInvalid, match=r"params\.own\.n\.max"), engine.begin() as connection:
        insert(connection, LOOSE, 0)
    assert store.versions("acme") == []


def test_a_floor_under_which_a_tenant_could_not_hold_is_refused_by_that_tenants_name(engine: Engine) -> None:
    put(engine, LOOSE)
    put(engine, document_value(tenant="globex"))
    with pytest.raises(PolicyInvalid, match=r"acme: params\.own\.n\.max") as refused, engine.begin() as connection:
        insert(connection, FLOOR, 0)
    assert len(refused.value.findings) == 1


def test_a_version_stored_before_the_floor_is_checked_again_when_activated(engine: Engine) -> None:
    with engine.begin() as connection:
        insert(connection, LOOSE, 0)
    put(engine, FLOOR)
    with pytest.raises(PolicyInvalid), engine.begin() as connection:
        activate(connection, "acme", 1, 1)


def test_a_floor_that_allows_is_refused(engine: Engine) -> None:
    with pytest.raises(PolicyInvalid, match="denies"), engine.begin() as connection:
        insert(connection, document_value(tenant="*"), 0)


def test_a_change_of_the_floor_concerns_every_tenant(engine: Engine, store: PolicyStore) -> None:
    put(engine, document_value())
    before = store.current("acme")
    put(engine, floor_value(rules=[deny(roles_any=["intern"])]))
    store.invalidate("*")
    after = store.current("acme")
    assert before is not None
    assert after is not None
    assert (before.floor, before.digest) != (after.floor, after.digest)


def test_a_version_that_was_edited_in_the_database_is_served_to_nobody(engine: Engine, store: PolicyStore) -> None:
    put(engine, document_value())
    with engine.begin() as connection:
        connection.execute(text("UPDATE policy_version SET document = replace(document, 'app', 'all')"))
    for read in (lambda: store.current("acme"), lambda: store.version("acme", 1), lambda: store.versions("acme")):
        with pytest.raises(VersionDamaged):
            read()


def test_a_snapshot_read_while_a_change_came_in_is_not_kept(engine: Engine, store: PolicyStore) -> None:
    """Or a suspension would be forgotten: the reader saw the state before it and would keep that for ever."""
    put(engine, document_value())
    reading, changed = Event(), Event()

    def wait_once(*_: object) -> None:
        reading.set()
        changed.wait(10)  # only the first time: it stays set

    event.listen(engine, "before_cursor_execute", wait_once)
    reader = Thread(target=store.current, args=("acme",))
    reader.start()
    assert reading.wait(10)
    store.invalidate("acme")  # the change is committed elsewhere; only its news matters here
    changed.set()
    reader.join(10)
    put(engine, document_value(rules=[]), 2)
    current = store.current("acme")
    assert current is not None
    assert current.document.rules == ()


def test_a_change_made_elsewhere_is_seen_at_the_next_refresh(engine: Engine, store: PolicyStore) -> None:
    generation = put(engine, document_value())
    store.refresh()
    assert store.current("acme") is not None
    with engine.begin() as connection:
        set_suspended(connection, "acme", True, generation)
    assert not store.suspended_meanwhile("acme")
    store.refresh()
    assert store.newly_suspended() == {"acme"}
    assert store.held("acme") is None
    assert store.suspended_meanwhile("acme")
    assert store.suspended("acme")
    store.refresh()
    assert store.newly_suspended() == frozenset()
    assert store.held("acme") is not None


def test_a_floor_that_changed_elsewhere_concerns_every_tenant(engine: Engine, store: PolicyStore) -> None:
    put(engine, document_value())
    store.refresh()
    store.current("acme")
    put(engine, floor_value())
    store.refresh()
    assert store.held("acme") is None


def test_what_nobody_confirmed_for_too_long_decides_nothing(engine: Engine) -> None:
    clock = StandingClock()
    store = PolicyStore(engine, clock)
    put(engine, document_value())
    store.refresh(good_for_s=2)
    store.current("acme")
    clock.now += 1.9
    assert store.held("acme") is not None
    clock.now += 0.1
    for decide in (store.held, store.standing, store.suspended_meanwhile):
        with pytest.raises(StoreUnavailable):
            decide("acme")
    store.refresh(good_for_s=2)
    assert store.held("acme") is not None
