"""Rendering an answer: one JSON body, or server-sent events as they are released.

The shapes are OpenAI's, for chat and for plain completions. No pydantic here: a chunk is a dict and orjson.
It reads an outbox and knows nothing of how an answer comes to be. A caller that goes away abandons the outbox.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.request import TokenLogprob
from gateway.answer import Event, Failure, Outbox, Piece, Usage
from gateway.message import MessageReader
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

    def usage(self, usage: Usage) -> bytes: ...


def sse(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def usage_counts(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


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

    def usage(self, usage: Usage) -> bytes:
        return sse(self._chunk_head | {"choices": [], "usage": usage_counts(usage)})

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
        return orjson.dumps(body)

    def _logprob_content(self, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            data = self._token_text(token)
            return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

        return {
            "content": [one(e.token, e.logprob) | {"top_logprobs": [one(*top) for top in e.top]} for e in entries],
            "refusal": None,
        }


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
        self._chunk_head = self._head | {"usage": None} if include_usage else self._head
        self._token_text = token_text
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}  # choice → characters sent so far

    def opening(self, choices: int) -> bytes:
        return b""

    def chunk(self, piece: Piece) -> bytes:
        return sse(self._chunk_head | {"choices": [self._choice(piece.choice, [piece])]})

    def usage(self, usage: Usage) -> bytes:
        return sse(self._head | {"choices": [], "usage": usage_counts(usage)})

    def whole(self, texts: list[list[Piece]], usage: Usage) -> bytes:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(texts)]
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


class EmbeddingsRenderer:
    """`list` of `embedding`; a piece is a vector in base64. It is never streamed."""

    def __init__(self, model: str, *, base64: bool) -> None:
        self._model = model
        self._base64 = base64

    def whole(self, texts: list[list[Piece]], usage: Usage) -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": self._vector("".join(piece.text for piece in pieces))}
            for index, pieces in enumerate(texts)
        ]
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        body = {"object": "list", "data": data, "model": self._model, "usage": counts}
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    def _vector(self, text: str) -> object:
        return text if self._base64 else np.frombuffer(b64decode(text), dtype=np.float32)  # in its shortest decimals


async def chunks(outbox: Outbox, renderer: Renderer, choices: int, *, include_usage: bool) -> AsyncIterator[bytes]:
    """Yield server-sent events until the answer ends, what waits together in one piece: every piece is a system call.

    A failure ends it without `[DONE]`.
    """
    opening = renderer.opening(choices)
    while events := await outbox.take():
        yield opening + b"".join(_rendered(event, renderer, include_usage) for event in events)
        opening = b""


def _rendered(event: Event, renderer: Renderer, include_usage: bool) -> bytes:
    if isinstance(event, Piece):
        return renderer.chunk(event)
    if isinstance(event, Usage):
        return (renderer.usage(event) if include_usage else b"") + DONE
    return b"data: " + event.error.openai_body + b"\n\n"


async def collect(outbox: Outbox, choices: int) -> tuple[list[list[Piece]], Usage] | None:
    """Return the pieces of each choice and the usage, or None when the caller went away.

    Raises: ApiError, when the answer failed.
    """
    texts: list[list[Piece]] = [[] for _ in range(choices)]
    while events := await outbox.take():
        for event in events:
            if isinstance(event, Piece):
                texts[event.choice].append(event)
            elif isinstance(event, Failure):
                raise event.error
            else:
                return texts, event
    return None


class watch_disconnect:  # noqa: N801 - reads as a verb at its one place: `with watch_disconnect(...)`
    """While open, abandon `outbox` as soon as the client goes away."""

    def __init__(self, receive: Receive, outbox: Outbox) -> None:
        self._receive = receive
        self._outbox = outbox
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._outbox.abandon()


class EventStream(Response):
    """An ASGI response that sends an outbox as server-sent events.

    Starlette's own StreamingResponse is not used: it cancels the generator on disconnect, and it starts a task group
    per response. Here the only effect of a disconnect is `Outbox.abandon`.
    """

    def __init__(
        self, outbox: Outbox, renderer: Renderer, choices: int, headers: Mapping[str, str], *, include_usage: bool
    ) -> None:
        self._outbox = outbox
        self._chunks = chunks(outbox, renderer, choices, include_usage=include_usage)
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream"
        self.init_headers({"cache-control": "no-store", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with watch_disconnect(receive, self._outbox):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                more = True
                async for chunk in self._chunks:
                    more = not self._outbox.exhausted
                    await send({"type": "http.response.body", "body": chunk, "more_body": more})
                if more:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._outbox.abandon()
