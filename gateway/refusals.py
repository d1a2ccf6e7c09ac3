"""Refusals before a policy is asked, put on record: a good credential was shown, and the answer was no.

    403 permission_denied, 413, 431, 400 (not JSON, not of the form)   POST under /v1   `request.denied`
    403 permission_denied, 404 not_found                               under /audit     `audit.read` with its `outcome`

Such a record carries no prompt: where the body is too large or makes no sense there is none, and nobody may fill the
log with what no policy has looked at. It is a leaf of some 700 bytes beside the caller's encrypted identity. At most
`AT_ONCE` are being written, a small part of what ordinary requests may, so that refusals come into the log more slowly
than requests do; more are answered 503 `overloaded`.

Not on record: 503 `overloaded` and `draining` themselves (a durable write for each would make the overload worse, and
whoever is refused so is told to come again), and 401, which nobody can be named for.

Knows no routes. Source: policy.md, "Order of one request".
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

from audit.log import AuditLog
from audit.records import SYSTEM, DecisionEntry, Json, Record, request_denied
from audit.writer import LogUnavailable
from gateway import errors
from gateway.auth.claims import PLATFORM
from gateway.entries import principal_entry
from gateway.errors import ApiError
from gateway.oversight import Officer, read_record
from policies.request import Principal

AT_ONCE = 16  # records of refusals that wait for the log
NO_POLICY = "none"  # stands for the digest where none was asked
UNKNOWN_ALIAS = "(unknown)"  # no alias is written so: see `document.Name`
RECEIPT = "probity-receipt"

_LOOKS = frozenset({403, 404})


class Refusals:
    """One per process; lives on the event loop."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._waiting = 0

    async def question(
        self, refused: ApiError, action: str, request_id: str, principal: Principal, source: str | None
    ) -> ApiError:
        """Return what the caller is told of a question that was refused, once that is on record."""
        if not 400 <= refused.status < 500 or RECEIPT in refused.headers:
            return refused  # says nothing of the caller, or is on record
        return await self._put(refused, _denied(refused, action, request_id, principal, source))

    async def head(self, refused: ApiError, action: str | None, scope: Scope) -> ApiError:
        """The same for one that was refused before a route saw it. `action`: None where it was no question."""
        state = scope.get("state", {})
        principal = state.get("principal")
        if action is None or not isinstance(principal, Principal):
            return refused
        source = scope["client"][0] if scope.get("client") else None
        return await self.question(refused, action, state["request_id"], principal, source)

    async def look(self, refused: ApiError, view: str, officer: Officer, filters: Mapping[str, Json]) -> ApiError:
        """Return what an officer is told of a look that was refused, once that is on record where it belongs."""
        if refused.status not in _LOOKS:
            return refused
        return await self._put(refused, read_record(officer, officer.home, view, filters, rows=0, outcome=refused.code))

    async def _put(self, refused: ApiError, record: Record) -> ApiError:
        if self._waiting >= AT_ONCE:
            return errors.overloaded()
        self._waiting += 1
        try:
            receipt = await self._log.append(record)
        except LogUnavailable:
            return errors.audit_unavailable()
        finally:
            self._waiting -= 1
        return refused.with_headers({RECEIPT: str(receipt)})


def _denied(refused: ApiError, action: str, request_id: str, principal: Principal, source: str | None) -> Record:
    return request_denied(
        tenant=SYSTEM if principal.tenant == PLATFORM else principal.tenant,
        request_id=request_id,
        action=action,
        principal=principal_entry(principal),
        decision=DecisionEntry("deny", [{"code": refused.code}], NO_POLICY),
        code=refused.code,
        model_alias=UNKNOWN_ALIAS,
        guardrails=[],
        identities={"subject": principal.subject} | ({} if source is None else {"source": source}),
        prompt=None,
    )
