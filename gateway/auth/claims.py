"""The claims of a credential, typed and bounded: from untrusted members to a Principal.

    {"iss":"https://id.acme.example","sub":"mia@acme.example","aud":"probity","exp":1795000000,"iat":1794996400,
     "tenant":"acme-bank","roles":["app","contact-centre"],"client":"svc-crm","purpose":"complaint-summary"}

Only what was signed comes here. Knows no keys and no HTTP.

Source: contract.md, "Credentials"; RFC 7519 section 4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from policies.request import Principal

PLATFORM = "*"  # the tenant of a credential that speaks for the platform
RESERVED_TENANTS = frozenset({"system"})  # the log of platform events has this name

MAX_SUBJECT_CHARS = 256
MAX_ROLES = 32
MAX_AUDIENCES = 16
MAX_TIME_S = 2**53  # Unix seconds

TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
ROLE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}")
PURPOSE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class ClaimRefused(ValueError):
    """A claim is absent or not what it must be. `claim` is its name, a constant of ours."""

    def __init__(self, claim: str) -> None:
        super().__init__(f"`{claim}` is absent or not valid")
        self.claim = claim


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a credential of one issuer must say."""

    issuer: str
    audience: str
    tenants: frozenset[str] = frozenset()  # the issuer may speak for these; empty: for any
    leeway_s: float = 30.0  # 0 … 60, for clocks that disagree


def read_claims(claims: Mapping[str, object], expected: Expectation, now: float) -> Principal:
    """Return who the claims say is asking. `now` is Unix seconds. Raises: ClaimRefused."""
    if claims.get("iss") != expected.issuer:
        raise ClaimRefused("iss")
    _check_times(claims, now, expected.leeway_s)
    _check_audience(claims.get("aud"), expected.audience)
    tenant = _tenant(claims.get("tenant"))
    if expected.tenants and tenant not in expected.tenants:
        raise ClaimRefused("tenant")
    return Principal(
        issuer=expected.issuer,
        subject=_subject(claims.get("sub")),
        tenant=tenant,
        roles=_roles(claims.get("roles")),
        client=_optional(claims, "client", CLIENT),
        purpose=_optional(claims, "purpose", PURPOSE),
    )


def _check_times(claims: Mapping[str, object], now: float, leeway_s: float) -> None:
    expires, issued = _time(claims, "exp"), _time(claims, "iat")
    if now >= expires + leeway_s or expires <= issued:
        raise ClaimRefused("exp")
    if issued > now + leeway_s:
        raise ClaimRefused("iat")
    if "nbf" in claims and _time(claims, "nbf") > now + leeway_s:
        raise ClaimRefused("nbf")


def _time(claims: Mapping[str, object], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClaimRefused(name)
    if not 0 <= value <= MAX_TIME_S:  # neither infinity nor NaN is
        raise ClaimRefused(name)
    return float(value)


def _check_audience(value: object, audience: str) -> None:
    audiences = [value] if isinstance(value, str) else value
    if not isinstance(audiences, list) or len(audiences) > MAX_AUDIENCES:
        raise ClaimRefused("aud")
    if not all(isinstance(member, str) for member in audiences) or audience not in audiences:
        raise ClaimRefused("aud")


def _tenant(value: object) -> str:
    if value == PLATFORM:
        return PLATFORM
    if not isinstance(value, str) or not TENANT.fullmatch(value) or value in RESERVED_TENANTS:
        raise ClaimRefused("tenant")
    return value


def _subject(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_SUBJECT_CHARS or _CONTROL.search(value):
        raise ClaimRefused("sub")
    return value


def _roles(value: object) -> frozenset[str]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ROLES:
        raise ClaimRefused("roles")
    if not all(isinstance(role, str) and ROLE.fullmatch(role) for role in value):
        raise ClaimRefused("roles")
    return frozenset(value)


def _optional(claims: Mapping[str, object], name: str, form: re.Pattern[str]) -> str | None:
    value = claims.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ClaimRefused(name)
    return value
