"""What asks the model for something, under `/v1`: body → question → answer → JSON or server-sent events."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.responses import Response

from engine.message_parser import MessageParser
from gateway.admission import parse_json
from gateway.answer import Failure
from gateway.auth.authentication import with_purpose
from gateway.auth.permissions import Permission, Requirement, requires
from gateway.error_responses import invalid_fields
from gateway.errors import ApiError
from gateway.grant import Question
from gateway.message import readers_of
from gateway.openapi import reference
from gateway.pipeline import Answer
from gateway.rendering.chat import ChatRenderer
from gateway.rendering.completions import CompletionRenderer
from gateway.rendering.embeddings import EmbeddingsRenderer
from gateway.rendering.renderer import Envelope, Renderer, WholeRenderer
from gateway.rendering.responses import ResponsesRenderer
from gateway.schemas.bodies import InferenceRequest
from gateway.schemas.embeddings import EmbeddingsRequest
from gateway.schemas.inference import ChatRequest, CompletionRequest, TextRequest
from gateway.schemas.responses import ResponsesRequest
from gateway.state import AppState, state_of
from gateway.streaming import EventStream, collect, watch_disconnect
from policies.request import Principal


class HandMade(APIRoute):
    """A route whose endpoint reads the request itself: it is called once the route's requirement is met.

    The framework would look for parameters, files and background tasks, of which there are none, at every call.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        (dependency,) = self.dependant.dependencies
        requirement, endpoint = dependency.call, self.endpoint
        assert isinstance(requirement, Requirement)
        asks, action = "POST" in (self.methods or ()), action_of(self.path_format)

        async def handle(request: Request) -> Response:
            try:
                await requirement(request)
                response: Response = await endpoint(request)
            except ApiError as refused:
                raise (await _on_record(refused, action, request) if asks else refused) from None
            return response

        return handle


def action_of(path: str) -> str:
    """Return what policies call the action of a path: `/v1/chat/completions` is `chat.completions`."""
    return path.removeprefix("/v1/").replace("/", ".")


async def _on_record(refused: ApiError, action: str, request: Request) -> ApiError:
    principal = getattr(request.state, "principal", None)
    if not isinstance(principal, Principal):
        return refused
    source = request.client.host if request.client else None
    return await state_of(request).refusals.question(refused, action, request.state.request_id, principal, source)


router = APIRouter(prefix="/v1", route_class=HandMade)

Body = TypeVar("Body", ChatRequest, CompletionRequest, EmbeddingsRequest, ResponsesRequest)


@router.post("/chat/completions", openapi_extra=reference(ChatRequest), dependencies=[requires(Permission.INFER)])
async def chat_completions(request: Request) -> Response:
    body = await request.body()
    return await _answer(request, "chat.completions", body, _parse(ChatRequest, body))


@router.post("/completions", openapi_extra=reference(CompletionRequest), dependencies=[requires(Permission.INFER)])
async def completions(request: Request) -> Response:
    body = await request.body()
    return await _answer(request, "completions", body, _parse(CompletionRequest, body))


@router.post("/responses", openapi_extra=reference(ResponsesRequest), dependencies=[requires(Permission.INFER)])
async def responses(request: Request) -> Response:
    body = await request.body()
    stated = _parse(ResponsesRequest, body)
    try:
        asked = stated.chat()
    except ValidationError as invalid:
        raise invalid_fields(invalid, ChatRequest) from None
    answered = await _answered(request, "responses", body, asked)
    engine, thinking = state_of(request).engine, answered.answer.thinking
    parser = MessageParser(engine.dialect, thinking, calls=asked.tool_use is not None)
    renderer = ResponsesRenderer(
        _envelope(answered), stated, parser, engine.token_text, lambda text: len(engine.encode(text, chat=True))
    )
    return await _rendered(request, answered, renderer)


@router.post("/embeddings", openapi_extra=reference(EmbeddingsRequest), dependencies=[requires(Permission.INFER)])
async def embeddings(request: Request) -> Response:
    body = await request.body()
    asked = _parse(EmbeddingsRequest, body)
    answered = await _answered(request, "embeddings", body, asked)
    renderer = EmbeddingsRenderer(asked.model, base64=asked.encoding_format == "base64")
    return await _whole(request, answered, renderer)


def handlers() -> dict[str, Callable[[Request], Coroutine[Any, Any, Response]]]:
    """Return what answers a POST to each path of this file: its endpoint, once its requirement is met."""
    asking = (route for route in router.routes if isinstance(route, HandMade) and "POST" in (route.methods or ()))
    return {route.path_format: route.get_route_handler() for route in asking}


def _parse(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate(parse_json(body))
    except ValidationError as invalid:
        raise invalid_fields(invalid, kind) from None


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and its answer, on its way."""

    question: Question
    answer: Answer

    @property
    def headers(self) -> dict[str, str]:
        answer = self.answer
        return {"probity-receipt": answer.receipt, "probity-policy": answer.policy, "probity-model": answer.model}


def question_of(request: Request, action: str, body: bytes, asked: InferenceRequest) -> Question:
    """Return the question with who asks. Raises: ApiError (400): the purpose is not a name."""
    return Question(
        request_id=request.state.request_id,
        principal=with_purpose(request.state.principal, request.headers.get("probity-purpose")),
        action=action,
        request=asked,
        body=body,
        source=request.client.host if request.client else None,
        received=state_of(request).clock.monotonic(),
    )


async def _answered(request: Request, action: str, body: bytes, asked: InferenceRequest) -> Answered:
    question = question_of(request, action, body, asked)
    return Answered(question, await state_of(request).pipeline.answer(question))


async def _answer(request: Request, action: str, body: bytes, asked: TextRequest) -> Response:
    answered = await _answered(request, action, body, asked)
    return await _rendered(request, answered, _renderer(state_of(request), answered, asked))


async def _rendered(request: Request, answered: Answered, renderer: Renderer) -> Response:
    streamed = answered.question.request.stream
    return await (_streamed(request, answered, renderer) if streamed else _whole(request, answered, renderer))


async def _whole(request: Request, answered: Answered, renderer: WholeRenderer) -> Response:
    outbox = answered.answer.outbox
    try:
        with watch_disconnect(request.receive, outbox):
            collected = await collect(outbox, answered.question.request.outputs)
    except ApiError as error:
        raise error.with_headers(answered.headers) from None
    if collected is None:
        return Response(status_code=499)  # the client has gone; nobody reads this
    texts, usage = collected
    # The whole answer goes out, so its receipt is the one that covers the output.
    headers = answered.headers | {"probity-receipt": usage.receipt}
    return Response(renderer.whole(texts, usage), media_type="application/json", headers=headers)


async def _streamed(request: Request, answered: Answered, renderer: Renderer) -> Response:
    outbox = answered.answer.outbox
    stream = EventStream(outbox, renderer, answered.question.request.outputs, answered.headers)
    with watch_disconnect(request.receive, outbox):
        first = await outbox.peek()
    if isinstance(first, Failure):  # nothing was sent yet: the status line can still say it
        raise first.error.with_headers(answered.headers)
    return stream


def _envelope(answered: Answered) -> Envelope:
    question, answer = answered.question, answered.answer
    return Envelope(question.request_id, answer.created, question.request.model, answer.fingerprint)


def _renderer(state: AppState, answered: Answered, asked: TextRequest) -> Renderer:
    envelope = _envelope(answered)
    token_text, usage, logprobs = state.engine.token_text, asked.include_usage, asked.wants_logprobs
    if not isinstance(asked, ChatRequest):
        return CompletionRenderer(envelope, token_text, include_usage=usage, logprobs=logprobs)
    readers = readers_of(asked, state.engine.dialect, answered.answer.thinking, envelope.request_id)
    return ChatRenderer(envelope, token_text, include_usage=usage, logprobs=logprobs, readers=readers)
