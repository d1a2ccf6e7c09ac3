"""The follower: a thread that keeps a policy store in step with the database that several gateways share.

    change at A ─▶ tenant_state.generation ─▶ the follower of B sees it, ≤ `every_s` later ─▶ B reads anew

It asks one row every so often, and at once where something changed here. What the store remembers is good for
`every_s + patience_s` from the last answer; after that nothing is decided until the database answers again. The event
loop never waits for it: whatever hangs, hangs here.

Knows no gateway. Owned by who made it; `close` ends it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from policies.store import PolicyStore, StoreUnavailable

CLOSE_TIMEOUT_S = 1.0  # the thread is left to itself where the database keeps it longer


class Follower:
    def __init__(
        self,
        store: PolicyStore,
        *,
        every_s: float,
        patience_s: float,
        on_suspended: Callable[[str], None] = lambda tenant: None,  # called on the thread
        on_trouble: Callable[[BaseException], None] = lambda error: None,  # when it begins, not again while it lasts
    ) -> None:
        self._store = store
        self._every_s = every_s
        self._good_for_s = every_s + patience_s
        self._on_suspended = on_suspended
        self._on_trouble = on_trouble
        self._wake = threading.Event()
        self._ended = False
        self._in_trouble = False
        self._thread = threading.Thread(target=self._run, name="policy-follower", daemon=True)

    def start(self) -> None:
        """Follow from now on. Raises: StoreUnavailable: the database does not answer now."""
        self._store.refresh(self._good_for_s)
        self._store.news = self._wake.set
        self._thread.start()

    def close(self) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            self._wake.wait(self._every_s)
            self._wake.clear()
            if self._ended:
                return
            self._follow()

    def _follow(self) -> None:
        try:
            self._store.refresh(self._good_for_s)
        except StoreUnavailable as error:
            if not self._in_trouble:
                self._on_trouble(error)
            self._in_trouble = True
            return
        self._in_trouble = False
        for tenant in self._store.newly_suspended():
            self._on_suspended(tenant)
