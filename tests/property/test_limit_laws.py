"""The ledger against a list of everything that ever happened, added up anew at each question."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from policies.decision import LimitKind, LimitSpec, Scope
from policies.limits import DAY_S, DAY_SLOT_S, MINUTE_S, UNKNOWN_AFTER_S, Holder, LimitLedger, LimitRefusal
from tests.support.policies import StandingClock

HOLDERS = [Holder(tenant, subject) for tenant in ("acme", "globex") for subject in ("mia", "ben")]
LIMITS = tuple(
    LimitSpec("l", scope, kind, maximum)
    for scope, maxima in ((Scope.SUBJECT, (3, 60, 150, 2)), (Scope.TENANT, (4, 90, 240, 3)))
    for kind, maximum in zip(LimitKind, maxima, strict=True)
)


@dataclass
class Happened:
    id: str
    holder: Holder
    at: float
    tokens: int
    running: bool = True


def slot_end(at: float) -> float:
    return (math.floor(at / DAY_SLOT_S) + 1) * DAY_SLOT_S


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = StandingClock()
        self.ledger = LimitLedger(self.clock)
        self.happened: list[Happened] = []
        self.swept = self.clock.now

    def used(self, limit: LimitSpec, holder: Holder) -> int:
        own = [
            h
            for h in self.happened
            if h.holder.tenant == holder.tenant and (limit.scope is Scope.TENANT or h.holder == holder)
        ]
        now = self.clock.now
        if limit.kind is LimitKind.CONCURRENCY:
            return sum(1 for h in own if h.running)
        if limit.kind is LimitKind.TOKENS_PER_DAY:
            return sum(h.tokens for h in own if slot_end(h.at) > now - DAY_S)
        minute = [h for h in own if h.at > now - MINUTE_S]
        return len(minute) if limit.kind is LimitKind.REQUESTS_PER_MINUTE else sum(h.tokens for h in minute)

    def sweep_naively(self) -> None:
        self.swept = self.clock.now
        for one in self.happened:
            if one.at <= self.clock.now - UNKNOWN_AFTER_S:
                one.running = False

    @rule(holder=st.sampled_from(HOLDERS), tokens=st.integers(0, 70), some=st.sets(st.sampled_from(LIMITS)))
    def reserve(self, holder: Holder, tokens: int, some: set[LimitSpec]) -> None:
        if self.clock.now - self.swept > MINUTE_S:
            self.sweep_naively()
        fits = all(
            self.used(limit, holder) + (tokens if "tokens" in limit.kind.value else 1) <= limit.maximum
            for limit in some
        )
        id = str(len(self.happened))
        outcome = self.ledger.reserve(id, holder, tuple(some), tokens)
        assert isinstance(outcome, LimitRefusal) is not fits
        if fits:
            self.happened.append(Happened(id, holder, self.clock.now, tokens))

    @rule(which=st.integers(0, 40), used=st.integers(0, 70))
    def settle(self, which: int, used: int) -> None:
        self.ledger.settle(str(which), used)
        if which < len(self.happened) and self.happened[which].running:
            self.happened[which].running = False
            self.happened[which].tokens = used

    @rule()
    def sweep(self) -> None:
        self.ledger.sweep()
        self.sweep_naively()

    @rule(seconds=st.sampled_from([0.5, 7, 30, 59.5, 60, 61, 600, 3600, 40_000, 86_400]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def usage_is_what_happened(self) -> None:
        self.ledger.check_integrity()
        for holder in HOLDERS:
            assert self.ledger.usage(holder, LIMITS) == {limit: self.used(limit, holder) for limit in LIMITS}


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=120, stateful_step_count=40)
