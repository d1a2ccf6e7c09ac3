"""Who asks: the principal of a verified credential."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, as the verified credential says."""

    issuer: str
    subject: str
    tenant: str  # `*` is platform-wide
    roles: frozenset[str]
    client: str | None
    purpose: str | None
