"""The dialect of a model: how it writes thoughts and calls of tools into the text of an answer.

A message is, in this order and each part where there is one, thoughts, words and calls:

    HERMES        <think>…</think>Let me look.<tool_call>{"name": "fee", "arguments": {"of": "card"}}</tool_call>
                  with line feeds around what stands in tags
    LLAMA3_JSON   {"name": "fee", "parameters": {"of": "card"}}
                  instead of words; several are joined by `; `

Which one a model was trained on shows in its chat template. message_parser.py reads what is written so; where there is
something to enforce, message_grammar.py has nothing else be written.

Source: Hermes function calling (Nous Research), as Qwen 2.5 and 3 use it; the Llama 3.1 prompt format (Meta).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
TAGS = (THINK, THOUGHT, CALL, CALLED)


class ToolFormat(StrEnum):
    NONE = "none"  # the model knows no tools
    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"

    @property
    def arguments(self) -> str:
        """What the member of a call that holds its arguments is named."""
        return "parameters" if self is ToolFormat.LLAMA3_JSON else "arguments"


class Thinking(StrEnum):
    NEVER = "never"
    MAYBE = "maybe"  # the message may begin with thoughts
    BEGUN = "begun"  # the prompt ends within them


@dataclass(frozen=True, slots=True)
class Dialect:
    tools: ToolFormat = ToolFormat.NONE
    thinks: bool = False
    tokens: frozenset[str] = frozenset()  # which of TAGS are one token in the vocabulary

    @classmethod
    def of(cls, template: str, vocabulary: Container[str]) -> Dialect:
        """Return the dialect that a chat template shows. `vocabulary`: the tokens that are more than their letters."""
        tools = ToolFormat.NONE
        if CALL in template:
            tools = ToolFormat.HERMES
        elif "tools" in template and '"parameters":' in template and ("ipython" in template or "tool" in template):
            tools = ToolFormat.LLAMA3_JSON
        return cls(tools, THOUGHT in template, frozenset(tag for tag in TAGS if tag in vocabulary))

    def thinking(self, prompt: str) -> Thinking:
        """Return whether the message that follows `prompt`, a rendered template, may hold thoughts."""
        ending = prompt.rstrip()
        if not self.thinks or ending.endswith(THOUGHT):
            return Thinking.NEVER
        return Thinking.BEGUN if ending.endswith(THINK) else Thinking.MAYBE
