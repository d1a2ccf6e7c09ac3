"""What holds for a tenant, for those who run on the event loop: from memory, or read beside it.

The first request of a tenant after a change pays for a read; a database that hangs costs it its connection's timeout
and nobody else anything. Knows no policy's content.
"""

from __future__ import annotations

from gateway.bounded_reads import BoundedReads
from gateway.error_responses import note_failure
from policies.store import PolicyStore, Standing, VersionDamaged

AT_ONCE = 2  # reads: most wait for what the first one brings into memory


class Standings:
    """One per process; lives on the event loop."""

    def __init__(self, store: PolicyStore, waiting: int) -> None:
        """`waiting`: requests that may wait for a read; more are answered 503 `overloaded`."""
        self._store = store
        self._reads = BoundedReads(AT_ONCE, waiting)

    async def of(self, tenant: str) -> Standing:
        """Raises: StoreUnavailable; ApiError when too many wait."""
        held = self._store.held(tenant)
        if held is not None:
            return held
        try:
            return await self._reads.run(self._store.standing, tenant)
        except VersionDamaged as damaged:
            note_failure("policy_not_as_recorded", damaged)
            raise

    def suspended_meanwhile(self, tenant: str) -> bool:
        """Whether a tenant that is being answered is suspended by now. Raises: StoreUnavailable."""
        return self._store.suspended_meanwhile(tenant)
