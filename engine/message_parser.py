"""The message parser: text of an answer, as it arrives → thoughts, words and calls of tools. See dialect.py.

Nothing is lost: what cannot be read as its dialect writes it comes out as words. However the text is cut into pieces,
the parts joined are the same. Held back is only what may still turn out to be a tag: a few characters, or the head of a
call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from engine.dialect import CALL, CALLED, THINK, THOUGHT, Dialect, Thinking, ToolFormat

MAX_HEAD_CHARS = 256  # of a call, before its arguments

_BLANKS = " \t\r\n"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_LLAMA_HEAD = '{"name"'
_TAIL = {ToolFormat.HERMES: re.compile(rf"\s*\}}\s*{CALLED}"), ToolFormat.LLAMA3_JSON: re.compile(r"\s*\}")}
_CLOSING = {ToolFormat.HERMES: "}" + CALLED, ToolFormat.LLAMA3_JSON: "}"}  # the same without blanks


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    index: int  # among the message's calls
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str  # a further piece of a JSON value


Part = Thought | Words | CallBegun | CallArguments
# Takes what it can of the text that is held, told whether more will follow; returns whether another state may go on.
State = Callable[[bool], bool]


class MessageParser:
    """One message. `calls`: whether it may call; if not, what looks like a call is words."""

    def __init__(self, dialect: Dialect, thinking: Thinking, *, calls: bool) -> None:
        self._tools = dialect.tools if calls else ToolFormat.NONE
        self._held = ""
        self._parts: list[Part] = []
        self._calls = 0
        self._value = _JsonEnd()
        states = {Thinking.NEVER: self._opening, Thinking.MAYBE: self._doorstep, Thinking.BEGUN: self._thoughts}
        self._state: State = states[thinking]

    def push(self, text: str) -> list[Part]:
        """Return what a further piece of the text adds."""
        self._held += text
        return self._read(ended=False)

    def finish(self) -> list[Part]:
        """Return what was held back, once no text will follow."""
        return self._read(ended=True)

    def _read(self, *, ended: bool) -> list[Part]:
        while self._state(ended):
            pass
        parts, self._parts = self._parts, []
        return parts

    # --- thoughts ---

    def _doorstep(self, ended: bool) -> bool:
        """Whether there are thoughts at all."""
        begun = self._held.lstrip(_BLANKS)
        if begun.startswith(THINK):
            self._held = begun.removeprefix(THINK)
            self._state = self._past_blanks(self._thoughts)
            return True
        if THINK.startswith(begun) and not ended:
            return False
        self._state = self._opening
        return True

    def _thoughts(self, ended: bool) -> bool:
        return self._until(THOUGHT, Thought, self._past_blanks(self._opening), ended)

    def _past_blanks(self, then: State) -> State:
        """Blanks that follow a tag belong to neither side."""

        def skip(ended: bool) -> bool:
            self._held = self._held.lstrip(_BLANKS)
            if not self._held:
                return False
            self._state = then
            return True

        return skip

    # --- words ---

    def _opening(self, ended: bool) -> bool:
        """Where words, or calls, begin."""
        if self._tools is ToolFormat.LLAMA3_JSON:
            begun = self._held.lstrip(_BLANKS)
            if _LLAMA_HEAD.startswith(begun) and not ended:
                return False
            if begun.startswith(_LLAMA_HEAD):
                self._state = self._head
                return True
            self._tools = ToolFormat.NONE
        self._state = self._words
        return True

    def _words(self, ended: bool) -> bool:
        if self._tools is ToolFormat.HERMES:
            return self._until(CALL, Words, self._head, ended)
        self._put(Words(self._held))
        self._held = ""
        return False

    def _until(self, tag: str, kind: type[Thought | Words], then: State, ended: bool) -> bool:
        """Take text up to `tag`, without the blanks that surround it, and go on with `then`."""
        at = self._held.find(tag)
        if at >= 0:
            self._put(kind(self._held[:at].rstrip(_BLANKS)))
            self._held = self._held[at + len(tag) :]
            self._state = then
            return True
        certain = len(self._held) if ended else _certain(self._held, tag)
        self._put(kind(self._held[:certain]))
        self._held = self._held[certain:]
        return False

    # --- calls ---

    def _head(self, ended: bool) -> bool:
        head = _HEAD.match(self._held)
        if head is not None and head.end() < len(self._held):
            self._parts.append(CallBegun(self._calls, head[1]))
            self._held = self._held[head.end() :]
            self._value = _JsonEnd()
            self._state = self._arguments
            return True
        if ended or len(self._held) > MAX_HEAD_CHARS:
            self._give_up(CALL if self._tools is ToolFormat.HERMES else "")
            return True
        return False

    def _arguments(self, ended: bool) -> bool:
        end = self._value.find(self._held)
        text = self._held if end is None else self._held[:end]
        if text:
            self._parts.append(CallArguments(self._calls, text))
        self._held = self._held[len(text) :]
        if end is None:
            return False
        self._calls += 1
        self._state = self._tail
        return True

    def _tail(self, ended: bool) -> bool:
        """What closes a call."""
        tail = _TAIL[self._tools].match(self._held)
        if tail is not None:
            self._held = self._held[tail.end() :]
            self._state = self._between
            return True
        unfinished = _CLOSING[self._tools].startswith("".join(self._held.split()))
        if not unfinished:
            self._give_up("")
            return True
        if ended:
            self._held = ""  # half a tag is no words
        return False

    def _between(self, ended: bool) -> bool:
        rest = self._held.lstrip(_BLANKS + (";" if self._tools is ToolFormat.LLAMA3_JSON else ""))
        opening = CALL if self._tools is ToolFormat.HERMES else "{"
        if rest.startswith(opening):
            self._held = rest.removeprefix(CALL)
            self._state = self._head
            return True
        if opening.startswith(rest) and not ended:
            return False
        self._held = rest
        self._state = self._plain
        return True

    def _give_up(self, taken: str) -> None:
        """Let the rest be words, with the tag that was taken for a call's."""
        self._held = taken + self._held
        self._state = self._plain

    def _plain(self, ended: bool) -> bool:
        self._put(Words(self._held))
        self._held = ""
        return False

    def _put(self, part: Thought | Words) -> None:
        if part.text:
            self._parts.append(part)


class _JsonEnd:
    """Where a JSON object ends, which comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, piece: str) -> int | None:
        """Return how much of `piece` still belongs to the object; None: all of it, and it goes on."""
        for at, character in enumerate(piece):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


def _certain(text: str, tag: str) -> int:
    """Return how many characters of `text` cannot belong to a tag, or to the blanks before it."""
    begun = next((length for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), 0)
    return len(text[: len(text) - begun].rstrip(_BLANKS))
