"""The ledger: all buckets or none, settled once, rebuilt from the log, forgotten when nothing counts."""

from __future__ import annotations

import pytest

from policies.decision import LimitKind, LimitSpec, Scope
from policies.limits import (
    DAY_S,
    DAY_SLOT_S,
    UNKNOWN_AFTER_S,
    Holder,
    LimitLedger,
    LimitRefusal,
    PastUse,
    Reservation,
)
from tests.support.policies import StandingClock

MIA, BEN = Holder("acme", "mia"), Holder("acme", "ben")
REQUESTS = LimitSpec("desk", Scope.SUBJECT, LimitKind.REQUESTS_PER_MINUTE, 2)
TOKENS = LimitSpec("desk", Scope.TENANT, LimitKind.TOKENS_PER_MINUTE, 100)
DAILY = LimitSpec("desk", Scope.TENANT, LimitKind.TOKENS_PER_DAY, 1_000)
RUNNING = LimitSpec("desk", Scope.TENANT, LimitKind.CONCURRENCY, 2)


def refused(outcome: Reservation | LimitRefusal) -> LimitRefusal:
    assert isinstance(outcome, LimitRefusal)
    return outcome


def taken(outcome: Reservation | LimitRefusal) -> None:
    assert isinstance(outcome, Reservation)


def test_requests_are_counted_over_the_last_minute_exactly() -> None:
    clock = StandingClock()
    ledger = LimitLedger(clock)
    taken(ledger.reserve("1", MIA, (REQUESTS,), 1))
    clock.now += 20
    taken(ledger.reserve("2", MIA, (REQUESTS,), 1))
    told = refused(ledger.reserve("3", MIA, (REQUESTS,), 1))
    assert (told.limit_id, told.kind, told.retry_after_s, told.quota) == ("desk", REQUESTS.kind, 40.0, False)
    clock.now += 39.999
    refused(ledger.reserve("3", MIA, (REQUESTS,), 1))
    clock.now += 0.001
    taken(ledger.reserve("3", MIA, (REQUESTS,), 1))


def test_retry_after_is_when_it_fits() -> None:
    clock = StandingClock()
    ledger = LimitLedger(clock)
    for number, tokens in enumerate((10, 60, 30)):
        taken(ledger.reserve(str(number), MIA, (TOKENS,), tokens))
        clock.now += 5
    told = refused(ledger.reserve("x", MIA, (TOKENS,), 50))
    clock.now += told.retry_after_s - 0.001
    refused(ledger.reserve("x", MIA, (TOKENS,), 50))
    clock.now += 0.001
    taken(ledger.reserve("x", MIA, (TOKENS,), 50))


def test_a_refusal_takes_from_no_bucket() -> None:
    ledger = LimitLedger(StandingClock())
    limits = (RUNNING, REQUESTS, DAILY, TOKENS)
    refused(ledger.reserve("1", MIA, limits, 101))
    assert set(ledger.usage(MIA, limits).values()) == {0}
    assert ledger.accounts == 0
    taken(ledger.reserve("1", MIA, limits, 100))
    ledger.check_integrity()


def test_tenants_share_nothing_and_subjects_share_the_tenants_buckets() -> None:
    ledger = LimitLedger(StandingClock())
    taken(ledger.reserve("1", MIA, (TOKENS,), 60))
    refused(ledger.reserve("2", BEN, (TOKENS,), 60))
    taken(ledger.reserve("3", Holder("globex", "mia"), (TOKENS,), 60))
    assert ledger.usage(BEN, (REQUESTS, TOKENS)) == {REQUESTS: 0, TOKENS: 60}


def test_a_tenant_and_a_subject_of_similar_names_have_buckets_of_their_own() -> None:
    ledger = LimitLedger(StandingClock())
    taken(ledger.reserve("1", Holder("a", "b"), (REQUESTS,), 1))
    assert ledger.usage(Holder("a", ""), (REQUESTS,)) == {REQUESTS: 0}


def test_concurrency_is_freed_by_settling() -> None:
    ledger = LimitLedger(StandingClock())
    taken(ledger.reserve("1", MIA, (RUNNING,), 1))
    taken(ledger.reserve("2", BEN, (RUNNING,), 1))
    assert refused(ledger.reserve("3", MIA, (RUNNING,), 1)).kind is LimitKind.CONCURRENCY
    ledger.settle("1", 1)
    taken(ledger.reserve("3", MIA, (RUNNING,), 1))


def test_settling_replaces_what_was_reserved_once() -> None:
    ledger = LimitLedger(StandingClock())
    taken(ledger.reserve("1", MIA, (TOKENS, DAILY), 90))
    for used in (30, 5, 99):
        ledger.settle("1", used)
        assert ledger.usage(MIA, (TOKENS, DAILY, RUNNING)) == {TOKENS: 30, DAILY: 30, RUNNING: 0}
    ledger.settle("never reserved", 7)
    ledger.check_integrity()


def test_settling_after_the_minute_changes_the_day_only() -> None:
    clock = StandingClock()
    ledger = LimitLedger(clock)
    taken(ledger.reserve("1", MIA, (TOKENS, DAILY), 90))
    clock.now += 61
    taken(ledger.reserve("2", MIA, (TOKENS,), 100))
    ledger.settle("1", 30)
    assert ledger.usage(MIA, (TOKENS, DAILY)) == {TOKENS: 100, DAILY: 130}
    ledger.check_integrity()


def test_an_id_is_reserved_once() -> None:
    ledger = LimitLedger(StandingClock())
    ledger.reserve("1", MIA, (), 1)
    with pytest.raises(ValueError, match="once"):
        ledger.reserve("1", MIA, (), 1)


def test_an_unknown_outcome_stays_reserved_until_the_sweep() -> None:
    clock = StandingClock()
    ledger = LimitLedger(clock)
    taken(ledger.reserve("lost", MIA, (RUNNING, DAILY), 700))
    clock.now += UNKNOWN_AFTER_S - 1
    ledger.sweep()
    assert ledger.usage(MIA, (RUNNING, DAILY)) == {RUNNING: 1, DAILY: 700}
    clock.now += 1
    ledger.sweep()
    assert ledger.usage(MIA, (RUNNING, DAILY)) == {RUNNING: 0, DAILY: 700}
    ledger.settle("lost", 3)
    assert ledger.usage(MIA, (DAILY,)) == {DAILY: 700}


def test_a_days_budget_is_a_quota_and_never_frees_early() -> None:
    clock = StandingClock()
    ledger = LimitLedger(clock)
    begun = clock.now
    taken(ledger.reserve("1", MIA, (DAILY,), 1_000))
    told = refused(ledger.reserve("2", MIA, (DAILY,), 1))
    assert told.quota
    assert DAY_S <= told.retry_after_s <= DAY_S + DAY_SLOT_S
    clock.now = begun + DAY_S
    refused(ledger.reserve("2", MIA, (DAILY,), 1))
    clock.now = begun + told.retry_after_s
    taken(ledger.reserve("2", MIA, (DAILY,), 1))


def test_what_never_fits_is_a_quota() -> None:
    assert refused(LimitLedger(StandingClock()).reserve("1", MIA, (TOKENS,), 101)).quota


def test_restored_from_the_log_it_counts_as_before() -> None:
    clock = StandingClock(200_000.0)
    limits = (REQUESTS, TOKENS, DAILY, RUNNING)
    ledger = LimitLedger(clock)
    past = [(clock.now - back, tokens) for back, tokens in ((90_000, 999), (50_000, 400), (59, 20), (10, 30))]
    ledger.restore([PastUse(at, MIA, tokens) for at, tokens in reversed(past)])
    assert ledger.usage(MIA, limits) == {REQUESTS: 2, TOKENS: 50, DAILY: 450, RUNNING: 0}
    ledger.check_integrity()
    assert refused(ledger.reserve("1", MIA, limits, 1)).retry_after_s == 1.0
    with pytest.raises(ValueError, match="before it is used"):
        ledger.restore([])


def test_idle_accounts_are_forgotten_when_nothing_counts_any_more() -> None:
    clock = StandingClock()
    ledger = LimitLedger(clock)
    for number in range(50):
        holder = Holder("acme", f"subject-{number}")
        taken(ledger.reserve(str(number), holder, (), 5))
        ledger.settle(str(number), 5)
    assert ledger.accounts == 51
    clock.now += DAY_S
    ledger.sweep()
    assert ledger.accounts == 51
    clock.now += DAY_SLOT_S
    ledger.sweep()
    assert ledger.accounts == 0


def test_looking_at_usage_keeps_nothing() -> None:
    ledger = LimitLedger(StandingClock())
    for number in range(50):
        ledger.usage(Holder("acme", str(number)), (REQUESTS, TOKENS))
    assert ledger.accounts == 0
