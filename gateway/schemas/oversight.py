"""Wire types of officers: the filters of a search and the bodies of reveal and replay. Shapes only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from audit.query import MAX_LIMIT, RequestQuery
from audit.records import Json

# What the columns can hold: names and digests.
_TENANT = r"^(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)$"
_PURPOSE = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_CLIENT = r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$"

TenantName = Annotated[str, StringConstraints(pattern=_TENANT)]
Name = Annotated[str, StringConstraints(pattern=_PURPOSE)]
ClientName = Annotated[str, StringConstraints(pattern=_CLIENT)]
Subject = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Reason = Annotated[str, StringConstraints(min_length=3, max_length=1000, strip_whitespace=True)]
Case = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/#-]{0,63}$")]


class RequestFilters(BaseModel):
    """The query of `GET /audit/requests`. All that are given must hold."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    since: datetime = Field(alias="from", description="received at or after this time, e.g. 2026-11-01T00:00:00Z")
    until: datetime = Field(alias="to", description="received before this time")
    tenant: TenantName | None = None
    subject: Subject | None = Field(None, description="a person's identity, or its pseudonym")
    client: ClientName | None = None
    model: ClientName | None = Field(None, description="alias or version")
    decision: Literal["allow", "deny"] | None = None
    status: Literal["received", "completed", "denied", "failed", "interrupted", "cancelled"] | None = None
    purpose: Name | None = None
    guardrail: Name | None = Field(None, description="id of a guardrail that found something")
    limit: int = Field(100, ge=1, le=MAX_LIMIT)
    after: str | None = Field(None, max_length=64, description="`after` of the answer before")

    def query(self, tenants: tuple[str, ...] | None) -> RequestQuery:
        """Return the query over `tenants`; None is all. Raises: QueryRefused."""
        return RequestQuery(
            since=self.since,
            until=self.until,
            tenants=tenants,
            subject=self.subject,
            client=self.client,
            model=self.model,
            decision=self.decision,
            status=self.status,
            purpose=self.purpose,
            guardrail=self.guardrail,
            limit=self.limit,
            after=self.after,
        )

    def recorded(self) -> dict[str, Json]:
        """Return the filters that a leaf can hold: times, numbers and words of ours."""
        given = {"decision": self.decision, "status": self.status, "after": self.after}
        window: dict[str, Json] = {"from": _text(self.since), "to": _text(self.until), "limit": self.limit}
        recorded: dict[str, Json] = {name: value for name, value in given.items() if value is not None}
        return window | recorded

    def typed(self) -> dict[str, str]:
        """Return the filters that hold what somebody typed; the person asked about is an identity."""
        names = {
            "tenant": self.tenant,
            "client": self.client,
            "model": self.model,
            "purpose": self.purpose,
            "guardrail": self.guardrail,
        }
        return {name: value for name, value in names.items() if value is not None}


class RevealBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reason: Reason
    case: Case | None = None


class ReplayBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mode: Literal["regenerate", "forced"] = Field(
        "regenerate",
        description="generate the answer again, or go through the recorded one in one pass and ask at every position "
        "what would have come: the same bits, many times faster",
    )


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
