"""Answers as `/v1/completions` writes them."""

from __future__ import annotations

from typing import Any

import orjson

from engine.request import TokenLogprob
from gateway.answer import Piece, Usage
from gateway.errors import ApiError
from gateway.rendering.renderer import DONE, Envelope, prompt_logprobs, sse, sse_error, usage_counts
from gateway.trail import TokenText


class CompletionRenderer:
    """`text_completion`, streamed or whole."""

    def __init__(self, envelope: Envelope, token_text: TokenText, *, include_usage: bool, logprobs: bool) -> None:
        self._head = {
            "id": f"cmpl-{envelope.request_id}",
            "object": "text_completion",
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
        }
        self._include_usage = include_usage
        self._chunk_head = self._head | {"usage": None} if include_usage else self._head
        self._token_text = token_text
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}  # choice → characters sent so far

    def opening(self, choices: int) -> bytes:
        return b""

    def chunk(self, piece: Piece) -> bytes:
        return sse(self._chunk_head | {"choices": [self._choice(piece.choice, [piece])]})

    def closing(self, usage: Usage) -> bytes:
        counts = self._head | {"choices": [], "usage": usage_counts(usage)}
        return (sse(counts) if self._include_usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        return sse_error(error)

    def whole(self, texts: list[list[Piece]], usage: Usage) -> bytes:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(texts)]
        choices[0] |= prompt_logprobs(usage, self._token_text)
        return orjson.dumps(self._head | {"choices": choices, "usage": usage_counts(usage)})

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        entries = tuple(entry for piece in pieces for entry in piece.logprobs)
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprob_lists(index, entries) if self._logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprob_lists(self, index: int, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        tokens = [self._token_text(entry.token).decode(errors="replace") for entry in entries]
        offsets, offset = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self._token_text(token).decode(errors="replace"): logprob for token, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }
