"""`POST /v1/chat/completions` and `POST /v1/completions`: body → question → answer → JSON or server-sent events."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from gateway.admission import parse_json
from gateway.answer import Failure
from gateway.auth.authentication import with_purpose
from gateway.auth.permissions import Permission, Requirement, requires
from gateway.error_responses import invalid_fields
from gateway.errors import ApiError
from gateway.grant import Question
from gateway.message import readers_of
from gateway.pipeline import Answer
from gateway.schemas.inference import ChatRequest, CompletionRequest, InferenceRequest
from gateway.state import AppState, state_of
from gateway.streaming import (
    ChatRenderer,
    CompletionRenderer,
    Envelope,
    EventStream,
    Renderer,
    collect,
    watch_disconnect,
)


class HandMade(APIRoute):
    """A route whose endpoint reads the request itself: it is called once the route's requirement is met.

    The framework would look for parameters, files and background tasks, of which there are none, at every call.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        (dependency,) = self.dependant.dependencies
        requirement, endpoint = dependency.call, self.endpoint
        assert isinstance(requirement, Requirement)

        async def handle(request: Request) -> Response:
            await requirement(request)
            response: Response = await endpoint(request)
            return response

        return handle


router = APIRouter(prefix="/v1", route_class=HandMade)

Body = TypeVar("Body", ChatRequest, CompletionRequest)


def _schema(body: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI for a body that is read by hand, so that it can be parsed strictly and recorded as sent."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post("/chat/completions", openapi_extra=_schema(ChatRequest), dependencies=[requires(Permission.INFER)])
async def chat_completions(request: Request) -> Response:
    body = await request.body()
    return await _answer(request, "chat.completions", body, _parse(ChatRequest, body))


@router.post("/completions", openapi_extra=_schema(CompletionRequest), dependencies=[requires(Permission.INFER)])
async def completions(request: Request) -> Response:
    body = await request.body()
    return await _answer(request, "completions", body, _parse(CompletionRequest, body))


def _parse(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate(parse_json(body))
    except ValidationError as invalid:
        raise invalid_fields(invalid, kind) from None


async def _answer(request: Request, action: str, body: bytes, asked: InferenceRequest) -> Response:
    state = state_of(request)
    received = state.clock.monotonic()
    request_id = request.state.request_id
    question = Question(
        request_id=request_id,
        principal=with_purpose(request.state.principal, request.headers.get("probity-purpose")),
        action=action,
        request=asked,
        body=body,
        source=request.client.host if request.client else None,
        received=received,
    )
    answer = await state.pipeline.answer(question)
    headers = {
        "probity-receipt": answer.receipt,
        "probity-policy": answer.policy,
        "probity-model": answer.model,
    }
    try:
        return await _render(request, state, question, answer, headers)
    except ApiError as error:
        raise error.with_headers(headers) from None


async def _render(
    request: Request, state: AppState, question: Question, answer: Answer, headers: dict[str, str]
) -> Response:
    asked = question.request
    renderer = _renderer(state, question, answer)
    if not asked.stream:
        with watch_disconnect(request.receive, answer.outbox):
            collected = await collect(answer.outbox, asked.choices)
        if collected is None:
            return Response(status_code=499)  # the client has gone; nobody reads this
        texts, usage = collected
        # The whole answer goes out, so its receipt is the one that covers the output.
        headers = headers | {"probity-receipt": usage.receipt}
        return Response(renderer.whole(texts, usage), media_type="application/json", headers=headers)
    with watch_disconnect(request.receive, answer.outbox):
        first = await answer.outbox.peek()
    if isinstance(first, Failure):  # nothing was sent yet: the status line can still say it
        raise first.error
    return EventStream(answer.outbox, renderer, asked.choices, headers, include_usage=asked.include_usage)


def _renderer(state: AppState, question: Question, answer: Answer) -> Renderer:
    asked = question.request
    envelope = Envelope(question.request_id, answer.created, asked.model, answer.fingerprint)
    token_text, usage, logprobs = state.engine.token_text, asked.include_usage, asked.wants_logprobs
    if not isinstance(asked, ChatRequest):
        return CompletionRenderer(envelope, token_text, include_usage=usage, logprobs=logprobs)
    readers = readers_of(asked, state.engine.dialect, answer.thinking, question.request_id)
    return ChatRenderer(envelope, token_text, include_usage=usage, logprobs=logprobs, readers=readers)
