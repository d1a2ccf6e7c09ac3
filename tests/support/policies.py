"""Policies for tests: one small document to vary, one request to vary, and a clock that stands until it is moved."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from policies.document import EffectivePolicy, PolicyDocument, compose, read_document
from policies.request import AccessRequest, Principal, RequestedParams

VERSION = "sha256:" + "a" * 64
OTHER_VERSION = "sha256:" + "b" * 64
LOADED = frozenset({VERSION})
FRIDAY_NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def document_value(**members: Any) -> dict[str, Any]:
    """Return a document in which role `app` may use `chat`; members given replace those of the same name."""
    value: dict[str, Any] = {
        "api_version": "policy/v1",
        "tenant": "acme",
        "name": "acme-prod",
        "default": "deny",
        "purposes": [{"id": "support", "data_classes": ["pii"]}, {"id": "code", "data_classes": ["internal"]}],
        "rules": [allow()],
        "models": {"chat": {"version": VERSION, "approval": "A-1", "expires": "2027-01-31"}},
    }
    return value | members


def floor_value(**members: Any) -> dict[str, Any]:
    return {"api_version": "policy/v1", "tenant": "*", "name": "floor", "default": "deny"} | members


def allow(id: str = "everybody", with_: dict[str, Any] | None = None, **when: Any) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "id": id,
        "effect": "allow",
        "when": {"roles_any": ["app"], "models_any": ["chat"]} | when,
    }
    return rule if with_ is None else rule | {"with": with_}


def deny(id: str = "never", reason: str | None = None, **when: Any) -> dict[str, Any]:
    rule: dict[str, Any] = {"id": id, "effect": "deny", "when": when}
    return rule if reason is None else rule | {"reason": reason}


def document(**members: Any) -> PolicyDocument:
    return read_document(document_value(**members))


def policy(floor: dict[str, Any] | None = None, **members: Any) -> EffectivePolicy:
    return compose(None if floor is None else read_document(floor), document(**members))


def request(
    *,
    roles: tuple[str, ...] = ("app",),
    client: str | None = "svc",
    tenant: str = "acme",
    action: str = "chat.completions",
    model: str = "chat",
    purpose: str | None = "support",
    source: str | None = "10.20.3.4",
    at: datetime = FRIDAY_NOON,
    max_tokens: int | None = None,
    temperature: str | None = None,
    top_p: str | None = None,
    n: int = 1,
) -> AccessRequest:
    return AccessRequest(
        principal=Principal("https://issuer", "mia", tenant, frozenset(roles), client, purpose),
        action=action,
        model=model,
        purpose=purpose,
        source=source,
        at=at,
        params=RequestedParams(
            max_tokens,
            None if temperature is None else Decimal(temperature),
            None if top_p is None else Decimal(top_p),
            n,
        ),
    )


class StandingClock:
    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
