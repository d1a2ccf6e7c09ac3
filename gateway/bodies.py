"""How much of all requests' bodies is in memory: bounded, and of one tenant three quarters, before anybody reads them.

The bound on requests in progress comes later, once a body was read and made sense. Knows numbers and names only; lives
on the event loop.
"""

from __future__ import annotations

from collections import Counter


class Bodies:
    def __init__(self, most: int) -> None:
        """`most`: bytes of all tenants."""
        self._most = most
        self._most_of_tenant = -(-3 * most // 4)
        self._held = 0
        self._of_tenant: Counter[str] = Counter()

    def take(self, tenant: str, count: int) -> bool:
        """Return whether there is room for `count` bytes more; then they are held until `give`."""
        if self._held + count > self._most or self._of_tenant[tenant] + count > self._most_of_tenant:
            return False
        self._held += count
        self._of_tenant[tenant] += count
        return True

    def give(self, tenant: str, count: int) -> None:
        """The request that took them has ended."""
        self._held -= count
        self._of_tenant[tenant] -= count
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]

    @property
    def held(self) -> int:
        return self._held
