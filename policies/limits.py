"""The limit ledger: reserve before the prompt runs, settle once after, exact and all or nothing.

Rates are sliding windows over what was used: at any moment, what began within the last 60 seconds (a day) plus what is
asked may not exceed the maximum. A reservation counts the prompt and the longest possible output; settling replaces it
by what was used, at the moment it was reserved. An outcome that stays unknown stays reserved until `sweep`.

In memory and exact for one process; after a restart the gateway rebuilds it from the log (`restore`), which is the
durable account. Not thread-safe: it lives on the event loop. Memory is bounded by what the windows hold.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from policies.decision import LimitKind, LimitSpec, Scope

MINUTE_S = 60.0
DAY_S = 86_400.0
UNKNOWN_AFTER_S = 3_600.0  # a reservation that nobody settled by then is swept: its requests died with a process
RETRY_CONCURRENCY_S = 1.0


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
class _Use:
    at: float
    tokens: int


@dataclass(slots=True)
class _Window:
    """What began within the last `span` seconds, oldest first, and its sum: a decision costs the same at any load."""

    span: float
    uses: deque[_Use] = field(default_factory=deque)
    tokens: int = 0

    def add(self, use: _Use) -> None:
        self.uses.append(use)
        self.tokens += use.tokens

    def forget(self, now: float) -> None:
        while self.uses and self.uses[0].at <= now - self.span:
            self.tokens -= self.uses.popleft().tokens

    def correct(self, use: _Use, tokens: int) -> None:
        """A use turned out to be of `tokens`; it counts only while it is in the window."""
        if self.uses and use.at >= self.uses[0].at:
            self.tokens += tokens - use.tokens


@dataclass(slots=True)
class _Account:
    """What one tenant or subject used."""

    minute: _Window = field(default_factory=lambda: _Window(MINUTE_S))
    day: _Window = field(default_factory=lambda: _Window(DAY_S))
    running: int = 0

    def add(self, use: _Use) -> None:
        self.minute.add(use)
        self.day.add(use)

    def forget(self, now: float) -> None:
        self.minute.forget(now)
        self.day.forget(now)

    def window(self, kind: LimitKind) -> _Window:
        return self.day if kind is LimitKind.TOKENS_PER_DAY else self.minute

    @property
    def idle(self) -> bool:
        return not self.day.uses and not self.running


@dataclass(slots=True)
class _Held:
    """A reservation that is not settled yet."""

    use: _Use
    accounts: tuple[_Account, ...]


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
            refusal = self._refusal(limit, self._account(holder.key(limit.scope), now), tokens, now)
            if refusal is not None:
                return refusal
        use = _Use(now, tokens)
        accounts = tuple(self._account(holder.key(scope), now) for scope in Scope)
        for account in accounts:
            account.add(use)
            account.running += 1
        self._held[reservation_id] = _Held(use, accounts)
        return Reservation(limits)

    def settle(self, reservation_id: str, tokens_used: int) -> None:
        """Replace what was reserved by what was used. Settling twice, or what was swept, changes nothing."""
        held = self._held.pop(reservation_id, None)
        if held is None:
            return
        for account in held.accounts:
            account.minute.correct(held.use, tokens_used)
            account.day.correct(held.use, tokens_used)
            account.running -= 1
        held.use.tokens = tokens_used

    def sweep(self) -> None:
        """Release what nobody settled, and forget accounts in which nothing counts any more."""
        now = self._swept_at = self._clock()
        for reservation_id, held in list(self._held.items()):
            if held.use.at <= now - UNKNOWN_AFTER_S:
                self.settle(reservation_id, held.use.tokens)
        for key, account in list(self._accounts.items()):
            account.forget(now)
            if account.idle:
                del self._accounts[key]

    def restore(self, past: Iterable[PastUse]) -> None:
        """Rebuild from the log, oldest first. Only on a fresh ledger."""
        now = self._clock()
        for entry in past:
            use = _Use(entry.at, entry.tokens)
            for scope in Scope:
                self._account(entry.holder.key(scope), now).add(use)
        self.sweep()

    def usage(self, holder: Holder, limits: tuple[LimitSpec, ...]) -> dict[LimitSpec, int]:
        """Return what counts against each limit now."""
        now = self._clock()
        return {limit: self._used(limit.kind, self._account(holder.key(limit.scope), now)) for limit in limits}

    def _account(self, key: str, now: float) -> _Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account()
        account.forget(now)
        return account

    def _refusal(self, limit: LimitSpec, account: _Account, tokens: int, now: float) -> LimitRefusal | None:
        adds = tokens if limit.kind in (LimitKind.TOKENS_PER_MINUTE, LimitKind.TOKENS_PER_DAY) else 1
        excess = self._used(limit.kind, account) + adds - limit.maximum
        if excess <= 0:
            return None
        return LimitRefusal(
            limit_id=limit.id,
            kind=limit.kind,
            retry_after_s=self._retry_after(limit, account, excess, now),
            quota=limit.kind is LimitKind.TOKENS_PER_DAY or adds > limit.maximum,
        )

    def _used(self, kind: LimitKind, account: _Account) -> int:
        if kind is LimitKind.CONCURRENCY:
            return account.running
        if kind is LimitKind.REQUESTS_PER_MINUTE:
            return len(account.minute.uses)
        return account.window(kind).tokens

    def _retry_after(self, limit: LimitSpec, account: _Account, excess: int, now: float) -> float:
        """Return the seconds until enough of the window has passed, as it stands now."""
        if limit.kind is LimitKind.CONCURRENCY:
            return RETRY_CONCURRENCY_S
        window = account.window(limit.kind)
        for use in window.uses:
            excess -= 1 if limit.kind is LimitKind.REQUESTS_PER_MINUTE else use.tokens
            if excess <= 0:
                return max(0.0, math.ceil((use.at + window.span - now) * 1000) / 1000)
        return window.span
