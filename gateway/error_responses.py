"""How an error reaches the wire: the shape by path, validation without an echo, and containment of everything else.

Knows the framework; the errors themselves are in errors.py. Diagnostics get the types and places of a failure, never
its message: a message may quote a body, a row or a credential.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import (
    ApiError,
    ResponseBroken,
    internal_error,
    invalid_request,
    method_not_allowed,
    not_found,
)

PROBLEM_PREFIXES = ("/audit", "/admin")  # decides the shape of an error, and nothing else

_diagnostics = logging.getLogger("probity.errors")


# --- validation, without an echo ---

# Messages of pydantic that are made of what the schema says, never of what was sent. Any other becomes "is not valid".
# A `value_error` comes from a validator of our schemas, whose text is constant and may carry the field as `name`.
_SAFE_KINDS = frozenset(
    {
        *("missing", "extra_forbidden", "literal_error", "enum", "finite_number", "multiple_of"),
        *("string_type", "int_type", "int_from_float", "float_type", "bool_type", "list_type", "dict_type"),
        *("tuple_type", "decimal_type", "model_type", "model_attributes_type"),
        *("int_parsing", "float_parsing", "bool_parsing", "decimal_parsing"),
        *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
        *("too_long", "too_short", "string_too_long", "string_too_short"),
    }
)


def invalid_fields(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """Return the 400 for a body that is not a `model`. Only names that `model` declares are repeated."""
    return _invalid(error.errors(include_url=False, include_input=False), _declared_names(model))


@lru_cache(maxsize=64)
def _declared_names(model: type[BaseModel]) -> frozenset[str]:
    schema = model.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    return frozenset(name for part in objects for name in part.get("properties", {}))


def _invalid(problems: Iterable[Mapping[str, Any]], declared: frozenset[str]) -> ApiError:
    problem = next(iter(problems), None)
    if problem is None:
        return invalid_request("the request is not valid")
    place = [part for part in problem["loc"] if isinstance(part, int) or part in declared]
    param = ".".join(str(part) for part in place) or None
    subject = f"`{param}`" if param else "the body"
    if problem["type"] == "extra_forbidden":
        where = f"in {subject}" if param else "in the body"
        return invalid_request(f"an unknown field stands {where}; leave it out", param=param)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ValueError) and problem["type"] == "value_error":
        return invalid_request(str(cause), param=getattr(cause, "name", None) or param)
    message = problem["msg"] if problem["type"] in _SAFE_KINDS else "is not valid"
    return invalid_request(f"{subject}: {message[:1].lower()}{message[1:]}", param=param)


def report_engine_trouble(event: str, places: Sequence[str]) -> None:
    """Note that a step of the engine is stuck or failed, and where: names and lines, no values."""
    _diagnostics.critical(event, extra={"component": "engine", "error_places": list(places)})


def report_model_reading(file: str, done: int, size: int) -> None:
    """Note that a file of the model has been read whole: a large one takes a while, and whoever starts it waits."""
    if done == size:
        _diagnostics.info("model_file_read", extra={"component": file, "count": size})


# --- on the wire ---


def is_problem_path(path: str) -> bool:
    return any(path == prefix or path.startswith((f"{prefix}/", f"{prefix}:")) for prefix in PROBLEM_PREFIXES)


def render(error: ApiError, path: str) -> Response:
    """Return the response for `error`, in the shape that callers of `path` read."""
    if is_problem_path(path):
        return Response(error.problem_body, error.status, error.headers, "application/problem+json")
    return Response(error.openai_body, error.status, error.headers, "application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every refusal in the contract's shape. Wrap it in `Containment` for everything else."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unforeseen)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return render(error, request.url.path)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Parameters of routes are declared by us; a body is validated by `invalid_fields`, which knows its model.
    names = frozenset(part for part in _parameter_names(request) if isinstance(part, str))
    return render(_invalid(error.errors(), names), request.url.path)


def _parameter_names(request: Request) -> Iterable[str]:
    dependant = getattr(request.scope.get("route"), "dependant", None)
    if dependant is None:
        return ()
    groups = (dependant.path_params, dependant.query_params, dependant.header_params)
    return [name for group in groups for field in group for name in (field.alias, *_members(field))]


def _members(field: Any) -> Iterable[str]:
    """Return the names that a model of parameters declares; one by one they stand in the query."""
    declared = getattr(field.field_info.annotation, "model_fields", {})
    return [member.alias or name for name, member in declared.items()]


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    named = {404: not_found, 405: method_not_allowed}.get(error.status_code)
    if named is not None:
        return render(named().with_headers(error.headers or {}), request.url.path)
    if 400 <= error.status_code < 500:
        return render(
            ApiError(error.status_code, "invalid_request", "invalid_request_error", "the request is not valid"),
            request.url.path,
        )
    return render(internal_error(), request.url.path)


async def _on_unforeseen(request: Request, _: Exception) -> Response:
    """The framework raises the exception again after this answer; `Containment` notes it there."""
    return render(internal_error(), request.url.path)


class Containment:
    """Pure ASGI, outermost: an unexpected exception becomes a 500 that says nothing, and is noted without its message.

    A message or a traceback may quote a body, a row or a credential; diagnostics get the types and the places only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = ended = False

        async def watched_send(message: Message) -> None:
            nonlocal begun, ended
            await send(message)
            begun = True
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            if not isinstance(error, ApiError):
                note_failure("request_failed", error)
            if begun and not ended:
                raise ResponseBroken from None
            if not begun:
                answer = error if isinstance(error, ApiError) else internal_error()
                await render(answer, scope["path"])(scope, receive, send)


def note_failure(event: str, error: BaseException) -> None:
    """Put a failure in the diagnostics: types and places, no messages, no values."""
    _diagnostics.error(event, extra={"error_types": _types(error), "error_places": _places(error)})


def _types(error: BaseException) -> list[str]:
    """Return the type names from `error` down its causes, at most 8."""
    names: list[str] = []
    current: BaseException | None = error
    while current is not None and len(names) < 8:
        names.append(f"{type(current).__module__}.{type(current).__qualname__}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return names


def _places(error: BaseException) -> list[str]:
    """Return `file:line` of the innermost 12 frames."""
    places: list[str] = []
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return places[-12:]
