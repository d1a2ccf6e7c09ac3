"""Authentication in front of everything: headers only, before a byte of the body is read.

Pure ASGI. A good credential puts its principal in the request's state; anything else is one constant 401. Public paths
come from the routes' own declarations and match exactly. Knows no roles and no permissions.

Source: RFC 6750 section 2.1 (only the `authorization` header; never a query parameter or a form).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import errors
from gateway.auth.claims import PURPOSE
from gateway.auth.verifier import CredentialRefused, Refusal, TokenVerifier
from gateway.error_responses import render
from policies.request import Principal

_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([^ ]+)")


class Authentication:
    def __init__(
        self,
        app: ASGIApp,
        verifier: TokenVerifier,
        public_paths: frozenset[str],  # exact
        on_refusal: Callable[[Refusal], None] = lambda _: None,  # a counter
    ) -> None:
        self._app = app
        self._verifier = verifier
        self._public_paths = public_paths
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in self._public_paths):
            await self._app(scope, receive, send)
            return
        try:
            principal = await self._verifier.verify(_bearer(scope))
        except CredentialRefused as refused:
            self._on_refusal(refused.reason)
            await _refuse(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = principal
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> bytes:
    """Return the one credential of the request. Raises: CredentialRefused."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if not values:
        raise CredentialRefused(Refusal.ABSENT)
    match = _BEARER.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        raise CredentialRefused(Refusal.MALFORMED)
    return match.group(1)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await render(errors.invalid_api_key(), scope["path"])(scope, receive, send)


def with_purpose(principal: Principal, header: str | None) -> Principal:
    """Return the principal with the purpose of the `probity-purpose` header, which goes before the claim.

    Raises: ApiError (400): not a purpose's name.
    """
    if header is None:
        return principal
    if not PURPOSE.fullmatch(header):
        raise errors.invalid_request("the header `probity-purpose` is not the name of a purpose", "probity-purpose")
    return replace(principal, purpose=header)
