"""The grammar of a whole message: its thoughts, the form of its words, and the calls it may make.

A call is always of a function that was offered, with arguments that its schema allows: also where the model may choose
to say words instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from engine.dialect import CALL, CALLED, THINK, THOUGHT, Dialect, Thinking, ToolFormat
from engine.grammar import message_source
from engine.request import Structure, StructureKind

MAX_CALLS = 16  # in one message

_NO_ARGUMENTS = '{"type":"object","properties":{}}'


@dataclass(frozen=True, slots=True)
class Function:
    name: str  # [a-zA-Z0-9_-]{1,64}
    parameters: str | None  # JSON Schema, as text


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a message may call."""

    functions: tuple[Function, ...]  # at least one
    required: bool  # the message is calls, at least one
    parallel: bool  # more than one


def message_structure(
    dialect: Dialect, thinking: Thinking, use: ToolUse | None, form: Structure | None
) -> Structure | None:
    """Return the structure of a whole message; None where there is nothing to enforce.

    `form` is what its words must look like, `use` what it may call; `dialect.tools` must know how.
    """
    if use is None and (form is None or thinking is Thinking.NEVER):
        return form
    parts = {} if form is None else {"form": form}
    for index, function in enumerate(() if use is None else use.functions):
        parts[f"arguments_{index}"] = Structure(StructureKind.JSON_SCHEMA, function.parameters or _NO_ARGUMENTS)
    return Structure(StructureKind.MESSAGE, message_source(_message(dialect, thinking, use, form), parts))


def _message(dialect: Dialect, thinking: Thinking, use: ToolUse | None, form: Structure | None) -> str:
    rules = [f"start: {_thoughts(thinking)} body", f"body: {_body(dialect, use, form)}"]
    if thinking is not Thinking.NEVER:
        opening = "" if thinking is Thinking.BEGUN else _tag(dialect, THINK)
        rules += [f"thoughts: {opening} thinking BLANKS", "BLANKS: /\\n{0,2}/", _up_to(dialect, "thinking", THOUGHT)]
    if use is not None:
        hermes = dialect.tools is ToolFormat.HERMES
        rules += _hermes_calls(dialect, use) if hermes else _llama_calls(use)
        rules += [_call(index, function, dialect.tools) for index, function in enumerate(use.functions)]
    return "\n".join(rules)


def _thoughts(thinking: Thinking) -> str:
    return {Thinking.NEVER: "", Thinking.MAYBE: "thoughts?", Thinking.BEGUN: "thoughts"}[thinking]


def _body(dialect: Dialect, use: ToolUse | None, form: Structure | None) -> str:
    if use is None:
        return "@form"
    if use.required:
        return "calls"
    if form is not None:
        return "@form | calls"
    return "WORDS | words_before inside further" if dialect.tools is ToolFormat.HERMES else "WORDS | calls"


def _hermes_calls(dialect: Dialect, use: ToolUse) -> list[str]:
    opening = _tag(dialect, CALL)
    return [
        f"calls: {opening} inside further",
        f'inside: "\\n" ({_names(use)}) "\\n" {_tag(dialect, CALLED)}',
        _repeated(f'"\\n" {opening} inside', use),
        f"WORDS: {_without(CALL)}",
        _up_to(dialect, "words_before", CALL),
    ]


def _llama_calls(use: ToolUse) -> list[str]:
    words = '/(.|\\n)*/ & ~/[ \\t\\n]*\\{"name"(.|\\n)*/'
    return [f"calls: ({_names(use)}) further", _repeated(f'"; " ({_names(use)})', use), f"WORDS: {words}"]


def _names(use: ToolUse) -> str:
    return " | ".join(f"call_{index}" for index in range(len(use.functions)))


def _repeated(call: str, use: ToolUse) -> str:
    return f"further: ({call}){{0,{MAX_CALLS - 1}}}" if use.parallel else 'further: ""'


def _call(index: int, function: Function, tools: ToolFormat) -> str:
    head = json.dumps(f'{{"name": "{function.name}", "{tools.arguments}": ')
    return f'call_{index}: {head} @arguments_{index} "}}"'


def _tag(dialect: Dialect, tag: str) -> str:
    return tag if tag in dialect.tokens else json.dumps(tag)


def _up_to(dialect: Dialect, rule: str, tag: str) -> str:
    """Return the rule of a text that ends with the first `tag`. One of letters is part of the text it ends: the lexer
    does not look back."""
    if tag in dialect.tokens:
        return f"{rule}: UP_TO_{rule.upper()} {tag}\nUP_TO_{rule.upper()}: {_without(tag)}"
    return f"{rule}[lazy]: /(.|\\n)*{_escaped(tag)}/"


def _without(tag: str) -> str:
    """Return the texts that do not spell out `tag`."""
    return f"/(.|\\n)*/ & ~/(.|\\n)*{_escaped(tag)}(.|\\n)*/"


def _escaped(tag: str) -> str:
    return tag.replace("/", "\\/")
