"""The short way: what asks the model goes from the middlewares straight to its route's own handler.

The framework's stack has nothing to do for these routes (their paths are constants, they read the request themselves,
and their handler checks the one permission they declare), and walks nine layers and all routes to find that out: a
tenth of the event loop's time. They stay declared on the app: for every other method, for the permissions' list and
for the documents. Errors become answers as the app's own handlers make them; what is no refusal goes on outwards.

Pure ASGI. Knows paths and handlers, nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.error_responses import render
from gateway.errors import ApiError

Handler = Callable[[Request], Awaitable[Response]]


class ShortWay:
    def __init__(self, app: FastAPI, posted: Mapping[str, Handler]) -> None:
        """`posted`: by exact path, what answers a POST to it; everything else is the app's."""
        self._app = app
        self._posted = posted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] == "POST"
        handler = self._posted.get(scope["path"]) if asks else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app  # where a handler finds the rooms
        try:
            response = await handler(Request(scope, receive, send))
        except ApiError as refused:
            response = render(refused, scope["path"])
        await response(scope, receive, send)
