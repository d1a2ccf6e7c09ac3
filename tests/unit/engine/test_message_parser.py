"""What a model wrote is taken apart into thoughts, words and calls, however its text is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dialect import CALL, CALLED, THINK, THOUGHT, Dialect, Thinking, ToolFormat
from engine.message_parser import CallArguments, CallBegun, MessageParser, Part, Thought, Words

HERMES = Dialect(ToolFormat.HERMES, thinks=True)
LLAMA = Dialect(ToolFormat.LLAMA3_JSON)


def read(
    text: str, dialect: Dialect = HERMES, thinking: Thinking = Thinking.MAYBE, *, calls: bool = True, cut: int = 1
) -> tuple[str, str, list[tuple[str, str]]]:
    """Return thoughts, words and calls of `text`, pushed `cut` characters at a time."""
    parser = MessageParser(dialect, thinking, calls=calls)
    parts: list[Part] = []
    for at in range(0, len(text), cut):
        parts += parser.push(text[at : at + cut])
    return joined([*parts, *parser.finish()])


def joined(parts: Sequence[Part]) -> tuple[str, str, list[tuple[str, str]]]:
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, CallBegun):
            assert part.index == len(calls)
            calls.append((part.name, ""))
        elif isinstance(part, CallArguments):
            assert part.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
    return thoughts, "".join(part.text for part in parts if isinstance(part, Words)), calls


def hermes_call(name: str, arguments: str) -> str:
    return f'{CALL}\n{{"name": "{name}", "arguments": {arguments}}}\n{CALLED}'


TRICKY = json.dumps({"a": 'x}"{</tool_call>', "b": ["\\", {"c": "]"}], "é": None})
CASES = [
    ("", "", "", []),
    ("Good morning.", "", "Good morning.", []),
    ("  \n", "", "  \n", []),
    (f"{THINK}\nhm\n{THOUGHT}\n\nYes.", "hm", "Yes.", []),
    (f"\n{THINK}{THOUGHT}", "", "", []),
    (f"{THINK}\nwas cut", "was cut", "", []),
    ("a < b, <thin, <think> later", "", "a < b, <thin, <think> later", []),
    (hermes_call("fee", "{}"), "", "", [("fee", "{}")]),
    (f"Let me look. \n{hermes_call('fee', TRICKY)}", "", "Let me look.", [("fee", TRICKY)]),
    (
        f"{THINK}x{THOUGHT}\n\nA{hermes_call('f', '{}')}\n{hermes_call('g_2', TRICKY)}",
        "x",
        "A",
        [("f", "{}"), ("g_2", TRICKY)],
    ),
    (f'{CALL}\n{{"name": "fee", "arguments": {{"of": "ca', "", "", [("fee", '{"of": "ca')]),
    (f'{CALL}\n{{"name": "fee", "arguments": {{}}}}\n</tool', "", "", [("fee", "{}")]),
    (f"{CALL}\nno json{CALLED}", "", f"{CALL}\nno json{CALLED}", []),
    (f'{CALL}{{"name": "fee"', "", f'{CALL}{{"name": "fee"', []),
    (f"{hermes_call('f', '{}')} and words", "", "and words", [("f", "{}")]),
    ("a <tool_ca", "", "a <tool_ca", []),
]


@pytest.mark.parametrize(("text", "thoughts", "words", "calls"), CASES)
@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_hermes_messages_are_taken_apart(
    text: str, thoughts: str, words: str, calls: list[tuple[str, str]], cut: int
) -> None:
    assert read(text, cut=cut) == (thoughts, words, calls)


@pytest.mark.parametrize("cut", [1, 2, 5, 1000])
def test_llama_calls_stand_for_the_whole_message(cut: int) -> None:
    one = f'{{"name": "fee", "parameters": {TRICKY}}}'
    assert read(one, LLAMA, Thinking.NEVER, cut=cut) == ("", "", [("fee", TRICKY)])
    assert read(f" {one}; {one}", LLAMA, Thinking.NEVER, cut=cut) == ("", "", [("fee", TRICKY)] * 2)
    for words in ('{"answer": 1}', f"Look: {one}", "", "{", '{"name'):
        assert read(words, LLAMA, Thinking.NEVER, cut=cut) == ("", words, [])


def test_what_may_not_call_says_words() -> None:
    text = f"A{hermes_call('f', '{}')}"
    assert read(text, calls=False) == ("", text, [])
    assert read(f"{THINK}a{THOUGHT}b", Dialect(), Thinking.NEVER) == ("", f"{THINK}a{THOUGHT}b", [])


def test_thoughts_that_the_prompt_began_need_no_tag() -> None:
    assert read(f"hm\n{THOUGHT}\nYes.", thinking=Thinking.BEGUN) == ("hm", "Yes.", [])


def test_words_leave_at_once_unless_they_may_begin_a_tag() -> None:
    parser = MessageParser(HERMES, Thinking.NEVER, calls=True)
    assert parser.push("Hello") == [Words("Hello")]
    assert parser.push(" <tool") == []
    assert parser.push("s>!") == [Words(" <tools>!")]
    assert parser.push(f"{CALL}\n") == []
    assert parser.push('{"name": "f", "arguments": {"a"') == [CallBegun(0, "f"), CallArguments(0, '{"a"')]


PIECES = st.sampled_from(
    [
        THINK,
        THOUGHT,
        CALL,
        CALLED,
        "\n",
        " ",
        "{",
        "}",
        '"',
        '{"name": "f", "arguments": ',
        "{}",
        "word",
        "<",
        "\\",
        ";",
    ]
)


@given(
    st.lists(PIECES, max_size=14).map("".join),
    st.lists(st.integers(0, 60), max_size=6),
    st.sampled_from([HERMES, LLAMA]),
    st.sampled_from(Thinking),
)
def test_how_a_text_is_cut_changes_nothing(text: str, cuts: list[int], dialect: Dialect, thinking: Thinking) -> None:
    parser = MessageParser(dialect, thinking, calls=True)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [part for start, end in pairwise(edges) for part in parser.push(text[start:end])]
    assert joined([*parts, *parser.finish()]) == read(text, dialect, thinking, cut=max(1, len(text)))
