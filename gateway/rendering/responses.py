"""Rendering an answer as `/v1/responses` writes it: items that follow each other, whole or as typed events.

    reasoning ▶ message ▶ function_call ▶ function_call …          each where there is one

A stream opens an item, adds to it and closes it, and the last event holds the whole response, as it is written without
a stream. Every id is made of the request's: an auditor can make it again.

Source: the OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.message_parser import CallArguments, CallBegun, MessageParser, Part, Thought, Words
from engine.request import TokenLogprob
from gateway.answer import Piece, Usage
from gateway.errors import ApiError
from gateway.rendering.renderer import Envelope
from gateway.schemas.responses import ResponsesRequest
from gateway.trail import TokenText

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(slots=True)
class _Item:
    """One item of the output, as far as it came."""

    index: int
    kind: type[Thought] | type[Words] | type[CallArguments]
    id: str
    text: str = ""  # of a call: its arguments
    name: str = ""  # of a call
    call_id: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def written(self, status: str) -> dict[str, Any]:
        head = {"id": self.id, "status": status}
        if self.kind is Thought:
            content = [self.part()] if status != "in_progress" else []
            return {**head, "type": "reasoning", "summary": [], "content": content}
        if self.kind is Words:
            content = [self.part()] if status != "in_progress" else []
            return {**head, "type": "message", "role": "assistant", "content": content}
        arguments = self.text if status != "in_progress" else ""
        return {**head, "type": "function_call", "call_id": self.call_id, "name": self.name, "arguments": arguments}

    def part(self) -> dict[str, Any]:
        if self.kind is Thought:
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}


class ResponsesRenderer:
    """One answer."""

    def __init__(
        self,
        envelope: Envelope,
        asked: ResponsesRequest,
        parser: MessageParser,
        token_text: TokenText,
        count: Callable[[str], int],  # tokens of a text
    ) -> None:
        self._envelope = envelope
        self._asked = asked
        self._parser = parser
        self._token_text = token_text
        self._count = count
        self._stem = envelope.request_id.replace("-", "")
        self._items: list[_Item] = []
        self._closed = 0  # leading items that are complete
        self._sequence = 0
        self._finish_reason: str | None = None

    # --- whole ---

    def whole(self, texts: list[list[Piece]], usage: Usage) -> bytes:
        for piece in texts[0]:
            self._take(piece)
        return orjson.dumps(self._response(usage))

    # --- streamed ---

    def opening(self, choices: int) -> bytes:
        response = self._response(None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def chunk(self, piece: Piece) -> bytes:
        return b"".join(self._take(piece))

    def closing(self, usage: Usage) -> bytes:
        kind = "response.incomplete" if self._finish_reason in _INCOMPLETE else "response.completed"
        return self._event(kind, response=self._response(usage))

    def failure(self, error: ApiError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    # --- items ---

    def _take(self, piece: Piece) -> list[bytes]:
        """Let a piece of the text make and fill items; return the events of it."""
        parts = self._parser.push(piece.text)
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            parts += self._parser.finish()
        events = [event for part in parts for event in self._add(part)]
        if piece.logprobs:
            self._note(piece.logprobs)
        if piece.finish_reason is not None and len(self._items) > self._closed:
            events += self._close()
        return events

    def _add(self, part: Part) -> Iterable[bytes]:
        if isinstance(part, CallBegun):
            yield from self._open(CallArguments, "fc", part.name, f"call_{self._stem}0{part.index:02x}")
            return
        if not self._items or self._items[-1].kind is not type(part):
            yield from self._open(type(part), "rs" if isinstance(part, Thought) else "msg")
        item = self._items[-1]
        item.text += part.text
        name = {Thought: "reasoning_text", Words: "output_text", CallArguments: "function_call_arguments"}[type(part)]
        more: dict[str, Any] = {} if isinstance(part, CallArguments) else {"content_index": 0}
        if isinstance(part, Words):
            more["logprobs"] = []
        yield self._event(f"response.{name}.delta", item_id=item.id, output_index=item.index, delta=part.text, **more)

    def _open(
        self, kind: type[Thought] | type[Words] | type[CallArguments], prefix: str, name: str = "", call_id: str = ""
    ) -> Iterable[bytes]:
        if len(self._items) > self._closed:
            yield from self._close()
        index = len(self._items)
        item = _Item(index, kind, f"{prefix}_{self._stem}{index:02x}", name=name, call_id=call_id)
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=index, item=item.written("in_progress"))
        if kind is not CallArguments:
            yield self._event(
                "response.content_part.added", item_id=item.id, output_index=index, content_index=0, part=item.part()
            )

    def _close(self) -> Iterable[bytes]:
        """Close the latest item. An answer that was cut short leaves it incomplete."""
        item = self._items[-1]
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.kind is CallArguments:
            yield self._event("response.function_call_arguments.done", **place, name=item.name, arguments=item.text)
        else:
            place["content_index"] = 0
            if item.kind is Thought:
                yield self._event("response.reasoning_text.done", **place, text=item.text)
            else:
                yield self._event("response.output_text.done", **place, text=item.text, logprobs=item.logprobs)
            yield self._event("response.content_part.done", **place, part=item.part())
        self._closed = len(self._items)
        yield self._event("response.output_item.done", output_index=item.index, item=item.written(self._status(item)))

    def _status(self, item: _Item) -> str:
        cut = self._finish_reason in _INCOMPLETE and item is self._items[-1]
        return "incomplete" if cut else "completed"

    def _note(self, logprobs: Iterable[TokenLogprob]) -> None:
        """Keep log-probabilities with the message; those of thoughts and calls have no place."""
        if self._items and self._items[-1].kind is Words:
            self._items[-1].logprobs += [
                self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(*top) for top in one.top]}
                for one in logprobs
            ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._token_text(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    # --- the response ---

    def _response(self, usage: Usage | None) -> dict[str, Any]:
        asked, envelope = self._asked, self._envelope
        incomplete = _INCOMPLETE.get(self._finish_reason or "")
        status = "in_progress" if usage is None else "completed" if incomplete is None else "incomplete"
        echoed = asked.model_dump(
            mode="json",
            by_alias=True,
            include={"instructions", "max_output_tokens", "metadata", "tools", "top_logprobs", "user"},
        )
        return {
            **echoed,
            "id": f"resp_{envelope.request_id}",
            "object": "response",
            "created_at": envelope.created,
            "status": status,
            "error": None,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
            "output": [] if usage is None else [item.written(self._status(item)) for item in self._items],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": None if asked.temperature is None else float(asked.temperature),
            "text": asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else _PLAIN_TEXT,
            "tool_choice": asked.tool_choice if isinstance(asked.tool_choice, str) else _choice(asked),
            "tools": echoed["tools"] or [],
            "top_p": None if asked.top_p is None else float(asked.top_p),
            "truncation": "disabled",
            "usage": None if usage is None else self._usage(usage),
        }

    def _usage(self, usage: Usage) -> dict[str, Any]:
        thoughts = sum(self._count(item.text) for item in self._items if item.kind is Thought)
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": thoughts},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _event(self, kind: str, **members: Any) -> bytes:
        payload = {"type": kind, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(payload) + b"\n\n"


_PLAIN_TEXT = {"format": {"type": "text"}}


def _choice(asked: ResponsesRequest) -> object:
    return "auto" if asked.tool_choice is None else asked.tool_choice.model_dump()  # type: ignore[union-attr]
