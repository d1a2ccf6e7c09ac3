"""The demo's tenants: the policies that come with the distribution, put into force over the admins' API.

As everywhere, one person writes a version and another activates it, and both acts are on record.
"""

from __future__ import annotations

from typing import Any

import httpx
import orjson

from policies import bundles
from policies.document import parse_policy

ACME, GLOBEX = "acme-bank", "globex-health"
REASON = "the demo's own policies"


class PolicyNotInForce(Exception):
    """The gateway refused one of the bundled policies."""


def put_policies_in_force(url: str, author: str, approver: str, model: str) -> list[str]:
    """Let the bundled policies hold for the model version `model`; return the names of those that did not yet.

    `author` and `approver` are platform-wide credentials with the roles of that name.

    Raises:
        PolicyNotInForce: the gateway refused.
    """
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        return [name for name in bundles.BUNDLES if _put_in_force(http, name, author, approver, model)]


def _put_in_force(http: httpx.Client, name: str, author: str, approver: str, model: str) -> bool:
    text = bundles.render(name, model)
    document = parse_policy(text)
    path = f"/admin/tenants/{document.tenant}/policy"
    seen = _ask(http, "GET", f"{path}/versions", author)
    active = http.get(path, headers=_bearer(author))
    if active.is_success and active.json()["document"] == orjson.loads(document.canonical()):
        return False
    drafted = _ask(http, "POST", f"{path}/versions", author, seen, {"document": text, "reason": REASON})
    number = drafted.json()["version"]
    _ask(http, "POST", f"{path}/versions/{number}:activate", approver, drafted, {"reason": REASON})
    return True


def _ask(
    http: httpx.Client,
    method: str,
    path: str,
    credential: str,
    seen: httpx.Response | None = None,
    body: dict[str, Any] | None = None,
) -> httpx.Response:
    headers = _bearer(credential) | ({} if seen is None else {"if-match": seen.headers["etag"]})
    response = http.request(method, path, headers=headers, json=body)
    if not response.is_success:
        raise PolicyNotInForce(f"{method} {path}: {response.status_code} {response.text[:500]}")
    return response


def _bearer(credential: str) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"}
