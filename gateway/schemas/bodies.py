"""Every body that asks the model for something, by the action that policies and records name it."""

from __future__ import annotations

from gateway.schemas.embeddings import EmbeddingsRequest
from gateway.schemas.inference import ChatRequest, CompletionRequest
from gateway.schemas.responses import ResponsesRequest
from gateway.strict_json import parse_json

InferenceRequest = ChatRequest | CompletionRequest | EmbeddingsRequest

BODIES: dict[str, type[InferenceRequest | ResponsesRequest]] = {
    "chat.completions": ChatRequest,
    "completions": CompletionRequest,
    "embeddings": EmbeddingsRequest,
    "responses": ResponsesRequest,
}


def read_body(action: str, body: bytes) -> InferenceRequest:
    """Return what `body` asks for.

    Raises: MalformedJson, ValidationError, KeyError: the action is not one.
    """
    return read_value(action, parse_json(body))


def read_value(action: str, value: object) -> InferenceRequest:
    """Return what a JSON value asks for. Raises: ValidationError, KeyError."""
    read = BODIES[action].model_validate(value)
    return read.chat() if isinstance(read, ResponsesRequest) else read
