"""The limit ledger: reserve before the prompt runs, settle once after, exact and all or nothing.

Rates are sliding windows over what was used. By the minute: what began within the last 60 seconds plus what is asked
may not exceed the maximum. By the day: the same over 24 hours, kept in slots of ten minutes that leave whole, so a use
counts for 24 hours and up to ten minutes more, never less. A reservation counts the prompt and the longest possible
output; settling replaces it by what was used, at the moment it was reserved. An outcome that stays unknown stays
reserved until `sweep`.

In memory and exact for one process; after a restart the gateway rebuilds it from the log (`restore`), which is the
durable account. Not thread-safe: it lives on the event loop. Memory: for each tenant and subject, the requests of the
last minute and at most 145 slots; accounts in which nothing counts any more are forgotten within a minute.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from policies.decision import LimitKind, LimitSpec, Scope

MINUTE_S = 60.0
DAY_S = 86_400.0
DAY_SLOT_S = 600.0
UNKNOWN_AFTER_S = 3_600.0  # a reservation that nobody settled by then is swept: its requests died with a process
RETRY_CONCURRENCY_S = 1.0

_COUNTED = frozenset({LimitKind.TOKENS_PER_MINUTE, LimitKind.TOKENS_PER_DAY})  # by token, the others by request


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose use is counted. `subject` may be a pseudonym: it is only compared."""

    tenant: str
    subject: str

    def key(self, scope: Scope) -> str:
        return self.tenant if scope is Scope.TENANT else f"{self.tenant}\0{self.subject}"


@dataclass(frozen=True, slots=True)
class LimitRefusal:
    limit_id: str
    kind: LimitKind
    retry_after_s: float
    quota: bool  # a budget is spent: trying again soon does not help


@dataclass(frozen=True, slots=True)
class Reservation:
    limits: tuple[LimitSpec, ...]


@dataclass(frozen=True, slots=True)
class PastUse:
    """One request of the past, as the log tells it."""

    at: float  # seconds, the ledger's clock
    holder: Holder
    tokens: int  # used; or reserved, where the request was never closed


@dataclass(slots=True, eq=False)
class _Slot:
    """Use that leaves a window together."""

    at: float  # when the last of it could begin, seconds
    requests: int = 0
    tokens: int = 0
    left: bool = False  # the window it was in is past it


class _Window:
    """What was used within the last `span_s`, oldest first, in slots of `slot_s`; 0: each use is its own."""

    def __init__(self, span_s: float, slot_s: float) -> None:
        self._span_s = span_s
        self._slot_s = slot_s
        self._slots: deque[_Slot] = deque()
        self.requests = 0
        self.tokens = 0

    def forget(self, now: float) -> None:
        while self._slots and self._slots[0].at <= now - self._span_s:
            slot = self._slots.popleft()
            slot.left = True
            self.requests -= slot.requests
            self.tokens -= slot.tokens

    def add(self, at: float, tokens: int) -> _Slot:
        ends = at if self._slot_s == 0 else (math.floor(at / self._slot_s) + 1) * self._slot_s
        if not self._slots or self._slots[-1].at != ends:
            self._slots.append(_Slot(ends))
        slot = self._slots[-1]
        slot.requests += 1
        self.requests += 1
        self.change(slot, tokens)
        return slot

    def change(self, slot: _Slot, tokens: int) -> None:
        slot.tokens += tokens
        if not slot.left:
            self.tokens += tokens

    def free_after(self, excess: int, by_token: bool, now: float) -> float:
        """Return the seconds until `excess` less counts, as it stands now."""
        for slot in self._slots:
            excess -= slot.tokens if by_token else slot.requests
            if excess <= 0:
                return max(0.0, math.ceil((slot.at + self._span_s - now) * 1000) / 1000)
        return self._span_s

    @property
    def empty(self) -> bool:
        return not self._slots

    def check_integrity(self) -> None:
        assert self.requests == sum(slot.requests for slot in self._slots)
        assert self.tokens == sum(slot.tokens for slot in self._slots)
        times = [slot.at for slot in self._slots]
        assert times == sorted(times)


class _Account:
    """What one tenant or subject used and runs."""

    def __init__(self) -> None:
        self.minute = _Window(MINUTE_S, 0.0)
        self.day = _Window(DAY_S, DAY_SLOT_S)
        self.running = 0

    def forget(self, now: float) -> None:
        self.minute.forget(now)
        self.day.forget(now)

    def add(self, at: float, tokens: int) -> tuple[tuple[_Window, _Slot], ...]:
        return tuple((window, window.add(at, tokens)) for window in (self.minute, self.day))

    def window(self, kind: LimitKind) -> _Window:
        return self.day if kind is LimitKind.TOKENS_PER_DAY else self.minute

    def used(self, kind: LimitKind) -> int:
        if kind is LimitKind.CONCURRENCY:
            return self.running
        return self.window(kind).tokens if kind in _COUNTED else self.window(kind).requests

    @property
    def idle(self) -> bool:
        return self.day.empty and self.minute.empty and not self.running


@dataclass(slots=True)
class _Held:
    """A reservation that is not settled yet."""

    at: float
    tokens: int
    accounts: tuple[_Account, ...]
    slots: tuple[tuple[_Window, _Slot], ...]


class LimitLedger:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._held: dict[str, _Held] = {}
        self._swept_at = clock()

    def reserve(
        self, reservation_id: str, holder: Holder, limits: tuple[LimitSpec, ...], tokens: int
    ) -> Reservation | LimitRefusal:
        """Take one request and `tokens` from every bucket, or from none.

        Raises:
            ValueError: the id is reserved already.
        """
        if reservation_id in self._held:
            raise ValueError("a reservation id is used once")
        now = self._clock()
        if now - self._swept_at > MINUTE_S:
            self.sweep()
        for limit in limits:
            refusal = _refusal(limit, self._account(holder.key(limit.scope), now), tokens, now)
            if refusal is not None:
                return refusal
        accounts = self._accounts_of(holder, now)
        slots = tuple(slot for account in accounts for slot in account.add(now, tokens))
        for account in accounts:
            account.running += 1
        self._held[reservation_id] = _Held(now, tokens, accounts, slots)
        return Reservation(limits)

    def settle(self, reservation_id: str, tokens_used: int) -> None:
        """Replace what was reserved by what was used. Settling twice, or what was swept, changes nothing."""
        held = self._held.pop(reservation_id, None)
        if held is None:
            return
        for window, slot in held.slots:
            window.change(slot, tokens_used - held.tokens)
        for account in held.accounts:
            account.running -= 1

    def sweep(self) -> None:
        """Release what nobody settled, and forget accounts in which nothing counts any more."""
        now = self._swept_at = self._clock()
        for reservation_id, held in list(self._held.items()):
            if held.at <= now - UNKNOWN_AFTER_S:
                self.settle(reservation_id, held.tokens)
        for key, account in list(self._accounts.items()):
            account.forget(now)
            if account.idle:
                del self._accounts[key]

    def restore(self, past: Iterable[PastUse]) -> None:
        """Rebuild from the log.

        Raises:
            ValueError: the ledger is in use already: what it holds would count twice.
        """
        if self._accounts:
            raise ValueError("a ledger is restored before it is used")
        now = self._clock()
        for entry in sorted(past, key=lambda entry: entry.at):
            for account in self._accounts_of(entry.holder, now):
                account.add(entry.at, entry.tokens)
        self.sweep()

    def usage(self, holder: Holder, limits: tuple[LimitSpec, ...]) -> dict[LimitSpec, int]:
        """Return what counts against each limit now."""
        now = self._clock()
        return {limit: self._account(holder.key(limit.scope), now).used(limit.kind) for limit in limits}

    def check_integrity(self) -> None:
        """Raise AssertionError where totals and what they are of differ."""
        for account in self._accounts.values():
            account.minute.check_integrity()
            account.day.check_integrity()
            assert account.running == sum(account in held.accounts for held in self._held.values())

    @property
    def accounts(self) -> int:
        """How many tenants and subjects are in memory."""
        return len(self._accounts)

    def _account(self, key: str, now: float) -> _Account:
        """Return an account to look at; only `_accounts_of` makes one that stays."""
        account = self._accounts.get(key) or _Account()
        account.forget(now)
        return account

    def _accounts_of(self, holder: Holder, now: float) -> tuple[_Account, ...]:
        accounts = tuple(self._accounts.setdefault(holder.key(scope), _Account()) for scope in Scope)
        for account in accounts:
            account.forget(now)
        return accounts


def _refusal(limit: LimitSpec, account: _Account, tokens: int, now: float) -> LimitRefusal | None:
    by_token = limit.kind in _COUNTED
    adds = tokens if by_token else 1
    excess = account.used(limit.kind) + adds - limit.maximum
    if excess <= 0:
        return None
    if limit.kind is LimitKind.CONCURRENCY:
        return LimitRefusal(limit.id, limit.kind, RETRY_CONCURRENCY_S, quota=False)
    return LimitRefusal(
        limit_id=limit.id,
        kind=limit.kind,
        retry_after_s=account.window(limit.kind).free_after(excess, by_token, now),
        quota=limit.kind is LimitKind.TOKENS_PER_DAY or adds > limit.maximum,
    )
