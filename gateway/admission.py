"""What is let in at all: the size, the kind and the haste of a request, before anyone reads its meaning.

Pure ASGI, behind authentication: an anonymous caller is refused before a byte of its body is read. Knows no routes.

Source: policy.md, "Order of one request"; RFC 9110 sections 8.3, 8.6.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import errors, strict_json
from gateway.bodies import Bodies
from gateway.bounded_http import LATE
from gateway.error_responses import render
from gateway.errors import ApiError
from gateway.strict_json import MalformedJson
from policies.request import Principal

_LENGTH = re.compile(rb"[0-9]{1,18}")
_JSON = re.compile(rb"application/(?:json|merge-patch\+json)[ \t]*(?:;[ \t]*charset=\"?utf-8\"?[ \t]*)?", re.IGNORECASE)
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


async def _as_it_is(refused: ApiError, scope: Scope) -> ApiError:
    return refused


class Admission:
    """Answers 413 to a body that is or becomes too large, 431 to headers that are, 400 to a body that is not JSON, 408
    to one that does not come in time, and 503 where the bodies of all requests have no room together."""

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_header_bytes: int,
        bodies: Bodies,
        on_record: Callable[[ApiError, Scope], Awaitable[ApiError]] = _as_it_is,
    ) -> None:
        """`on_record` returns what is told of a refusal, once that is on record."""
        self._app = app
        self._on_record = on_record
        self._bodies = bodies
        self._max_body_bytes = max_body_bytes
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False
        body = _Body(scope, receive, self._max_body_bytes, self._bodies)

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._admit(scope)
            await self._app(scope, body.receive, watched_send)
        except ApiError as refused:
            if begun:
                raise errors.ResponseBroken from None
            await _refuse(refused, scope, receive, send)
        finally:
            body.let_go()

    async def _admit(self, scope: Scope) -> None:
        try:
            self._check_head(scope)
        except ApiError as refused:
            raise await self._on_record(refused, scope) from None

    def _check_head(self, scope: Scope) -> None:
        """Raises: ApiError."""
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self._max_header_bytes:
            raise errors.headers_too_large(self._max_header_bytes)
        self._check_length([value for name, value in headers if name == b"content-length"])
        kinds = [value for name, value in headers if name == b"content-type"]
        if scope["method"] in _WITH_BODY and _has_body(headers) and not (len(kinds) == 1 and _JSON.fullmatch(kinds[0])):
            raise errors.invalid_request("the body must be JSON; send `content-type: application/json`")
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
            raise errors.invalid_request("the body must not be compressed; leave `content-encoding` out")

    def _check_length(self, lengths: list[bytes]) -> None:
        if not lengths:
            return
        if len(set(lengths)) != 1 or not _LENGTH.fullmatch(lengths[0]):
            raise errors.invalid_request("the header `content-length` is not one number")
        if int(lengths[0]) > self._max_body_bytes:
            raise errors.body_too_large(self._max_body_bytes)


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")) for name, value in headers
    )


class _Body:
    """One request's body as it comes in."""

    __slots__ = ("_bodies", "_held", "_max_bytes", "_receive", "_scope", "_tenant")

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, bodies: Bodies) -> None:
        principal = scope.get("state", {}).get("principal")
        self._scope = scope
        self._receive = receive
        self._max_bytes = max_bytes
        self._bodies = bodies
        self._tenant = principal.tenant if isinstance(principal, Principal) else ""
        self._held = 0

    async def receive(self) -> Message:
        """Raises: ApiError once more came than may, whatever the head said, or not all of it in time. The rest is
        never read, so the connection cannot carry another request."""
        message = await self._receive()
        if message["type"] == "http.request":
            if LATE in self._scope and message.get("more_body", False):
                raise errors.request_timeout().with_headers({"connection": "close"})
            came = len(message.get("body", b""))
            if self._held + came > self._max_bytes:
                raise errors.body_too_large(self._max_bytes).with_headers({"connection": "close"})
            if came and not self._bodies.take(self._tenant, came):
                raise errors.overloaded().with_headers({"connection": "close"})
            self._held += came
        return message

    def let_go(self) -> None:
        if self._held:
            self._bodies.give(self._tenant, self._held)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await render(error.with_headers({"connection": "close"}), scope["path"])(scope, receive, send)


def parse_json(body: bytes) -> object:
    """Return what the body says. Raises: ApiError (400), which names the rule that was broken and repeats nothing."""
    try:
        return strict_json.parse_json(body)
    except MalformedJson as error:
        raise errors.invalid_request(f"the body is not usable JSON: {error}") from None
