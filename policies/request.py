"""What is asked of a policy: who, what, with which model, for which purpose, from where, when. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, as a verified credential says. Purpose is declared by the caller, and bound to clients by rules."""

    issuer: str
    subject: str
    tenant: str
    roles: frozenset[str]
    client: str | None
    purpose: str | None


@dataclass(frozen=True, slots=True)
class RequestedParams:
    """What the caller asked for; None where it left the choice to the policy."""

    max_tokens: int | None
    temperature: Decimal | None
    top_p: Decimal | None
    n: int


@dataclass(frozen=True, slots=True)
class AccessRequest:
    principal: Principal
    action: str  # chat.completions | completions | …
    model: str  # the alias asked for
    purpose: str | None
    source: str | None  # the caller's address, IPv4 or IPv6 text
    at: datetime  # UTC
    params: RequestedParams
