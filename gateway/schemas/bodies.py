"""Every body that asks the model for something, by the action that policies and records name it."""

from __future__ import annotations

from gateway.schemas.embeddings import EmbeddingsRequest
from gateway.schemas.inference import ChatRequest, CompletionRequest
from gateway.strict_json import parse_json

InferenceRequest = ChatRequest | CompletionRequest | EmbeddingsRequest

_BODIES: dict[str, type[ChatRequest] | type[CompletionRequest] | type[EmbeddingsRequest]] = {
    "chat.completions": ChatRequest,
    "completions": CompletionRequest,
    "embeddings": EmbeddingsRequest,
}
ACTIONS = frozenset(_BODIES)


def read_body(action: str, body: bytes) -> InferenceRequest:
    """Return what `body` asks for.

    Raises: MalformedJson, ValidationError, KeyError: the action is not one.
    """
    return _BODIES[action].model_validate(parse_json(body))
