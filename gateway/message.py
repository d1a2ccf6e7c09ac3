"""The message that an answer to a request is: what it may hold, and how it is read. Pure; knows no HTTP."""

from __future__ import annotations

from typing import Any

from engine.dialect import Dialect, Thinking
from engine.message_grammar import message_structure
from engine.message_parser import CallArguments, CallBegun, MessageParser, Thought, Words
from engine.request import Structure
from gateway.schemas.inference import ChatRequest, TextRequest


def structure_of(asked: TextRequest, dialect: Dialect, prompt: str) -> Structure | None:
    """Return what the answer must look like. `prompt`: as the model is given it."""
    if not isinstance(asked, ChatRequest):
        return asked.form
    return message_structure(dialect, dialect.thinking(prompt), asked.tool_use, asked.form)


def readers_of(asked: ChatRequest, dialect: Dialect, thinking: Thinking, request_id: str) -> list[MessageReader]:
    """Return what reads each choice of the answer; nothing where all of it is words."""
    calls = asked.tool_use is not None
    if thinking is Thinking.NEVER and not calls:
        return []
    prefix = f"call_{request_id.replace('-', '')}"
    return [
        MessageReader(MessageParser(dialect, thinking, calls=calls), f"{prefix}{choice:x}")
        for choice in range(asked.choices)
    ]


class MessageReader:
    """One choice of an answer: released text → members of OpenAI's message, or of a piece of it."""

    def __init__(self, parser: MessageParser, call_prefix: str) -> None:
        """`call_prefix`: what the id of a call is made of, with its index; an auditor can make it again."""
        self._parser = parser
        self._call_prefix = call_prefix
        self.called = False  # a call was begun

    def delta(self, text: str, *, last: bool) -> dict[str, Any]:
        """Return what a further piece of text adds: `content`, `reasoning_content`, `tool_calls`, each if any."""
        parts = self._parser.push(text)
        if last:
            parts += self._parser.finish()
        delta: dict[str, Any] = {}
        for part in parts:
            if isinstance(part, Words):
                delta["content"] = delta.get("content", "") + part.text
            elif isinstance(part, Thought):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
            else:
                _add_call(delta.setdefault("tool_calls", []), part, self._call_prefix)
                self.called = True
        return delta

    def message(self, text: str) -> dict[str, Any]:
        """Return the whole message at once, from the whole text."""
        members = {"content": None, **self.delta(text, last=True)}
        for call in members.get("tool_calls", ()):
            del call["index"]
        if members["content"] is None and not self.called:
            members["content"] = ""
        return members


def _add_call(calls: list[dict[str, Any]], part: CallBegun | CallArguments, prefix: str) -> None:
    if isinstance(part, CallBegun):
        function = {"name": part.name, "arguments": ""}
        calls.append({"index": part.index, "id": f"{prefix}{part.index:02x}", "type": "function", "function": function})
        return
    if not calls or calls[-1]["index"] != part.index:
        calls.append({"index": part.index, "function": {"arguments": ""}})
    calls[-1]["function"]["arguments"] += part.text
