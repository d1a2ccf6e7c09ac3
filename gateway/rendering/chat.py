"""Answers as `/v1/chat/completions` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from engine.request import TokenLogprob
from gateway.answer import Piece, Usage
from gateway.errors import ApiError
from gateway.message import MessageReader
from gateway.rendering.renderer import DONE, Envelope, prompt_logprobs, sse, sse_error, usage_counts
from gateway.trail import TokenText


class ChatRenderer:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(
        self,
        envelope: Envelope,
        token_text: TokenText,
        *,
        include_usage: bool,
        logprobs: bool,
        readers: Sequence[MessageReader] = (),
    ) -> None:
        """`readers`: of each choice; none where all of the text is words."""
        self._head = {
            "id": f"chatcmpl-{envelope.request_id}",
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
        }
        self._chunk_head = self._head | {"object": "chat.completion.chunk"}
        self._include_usage = include_usage
        if include_usage:
            self._chunk_head["usage"] = None
        self._token_text = token_text
        self._logprobs = logprobs
        self._readers = readers

    def opening(self, choices: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(
            sse(self._chunk_head | {"choices": [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}]})
            for i in range(choices)
        )

    def chunk(self, piece: Piece) -> bytes:
        choice = {
            "index": piece.choice,
            "delta": self._delta(piece),
            "logprobs": self._logprob_content(piece.logprobs) if self._logprobs and piece.logprobs else None,
            "finish_reason": self._finish_reason(piece),
        }
        return sse(self._chunk_head | {"choices": [choice]})

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if self._readers:
            return self._readers[piece.choice].delta(piece.text, last=piece.finish_reason is not None)
        return {"content": piece.text} if piece.text else {}

    def _message(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        members = self._readers[index].message(text) if self._readers else {"content": text}
        return {"role": "assistant", "refusal": None, **members}

    def _finish_reason(self, piece: Piece) -> str | None:
        if piece.finish_reason == "stop" and self._readers and self._readers[piece.choice].called:
            return "tool_calls"
        return piece.finish_reason

    def closing(self, usage: Usage) -> bytes:
        counts = self._chunk_head | {"choices": [], "usage": usage_counts(usage)}
        return (sse(counts) if self._include_usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        return sse_error(error)

    def whole(self, texts: list[list[Piece]], usage: Usage) -> bytes:
        choices = []
        for index, pieces in enumerate(texts):
            logprobs = tuple(entry for piece in pieces for entry in piece.logprobs)
            choices.append(
                {
                    "index": index,
                    "message": self._message(index, pieces),
                    "logprobs": self._logprob_content(logprobs) if self._logprobs else None,
                    "finish_reason": self._finish_reason(pieces[-1]),
                }
            )
        body = self._head | {"object": "chat.completion", "choices": choices, "usage": usage_counts(usage)}
        return orjson.dumps(body | prompt_logprobs(usage, self._token_text))

    def _logprob_content(self, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            data = self._token_text(token)
            return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

        return {
            "content": [one(e.token, e.logprob) | {"top_logprobs": [one(*top) for top in e.top]} for e in entries],
            "refusal": None,
        }
