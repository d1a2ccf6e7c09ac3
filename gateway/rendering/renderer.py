"""What a renderer is, and what the renderers of OpenAI's older endpoints share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from gateway.answer import Piece, Usage
from gateway.errors import ApiError
from gateway.trail import TokenText

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of one answer repeats."""

    request_id: str
    created: int  # Unix seconds
    model: str  # the alias that was asked for
    fingerprint: str  # digest of the numeric policy


class WholeRenderer(Protocol):
    """How one endpoint writes an answer that leaves at once."""

    def whole(self, texts: list[list[Piece]], usage: Usage) -> bytes: ...


class Renderer(WholeRenderer, Protocol):
    """How one endpoint writes its answers."""

    def opening(self, choices: int) -> bytes: ...

    def chunk(self, piece: Piece) -> bytes: ...

    def closing(self, usage: Usage) -> bytes:
        """Return what ends a stream that came to its end."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """Return what ends a stream that failed."""
        ...


def sse(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def usage_counts(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def prompt_logprobs(usage: Usage, token_text: TokenText) -> dict[str, Any]:
    """Return the member that vLLM established: for each token of the prompt those that were likeliest there, and it."""
    if usage.prompt_logprobs is None:
        return {}
    entries = [
        {
            str(token): {"logprob": logprob, "decoded_token": token_text(token).decode(errors="replace")}
            for token, logprob in (*one.top, (one.token, one.logprob))
        }
        for one in usage.prompt_logprobs
    ]
    return {"prompt_logprobs": [None, *entries]}


def sse_error(error: ApiError) -> bytes:
    """Return what ends a stream that failed, without `[DONE]`."""
    return b"data: " + error.openai_body + b"\n\n"
