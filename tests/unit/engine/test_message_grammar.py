"""A message is of its grammar whatever the model would rather say, and its dialect is read from its template."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from engine.core import EngineCore
from engine.dialect import CALL, CALLED, THINK, THOUGHT, Dialect, Thinking, ToolFormat
from engine.grammar import Grammars
from engine.message_grammar import MAX_CALLS, Function, ToolUse, message_structure
from engine.message_parser import CallArguments, CallBegun, MessageParser, Thought, Words
from engine.request import FinishReason, RequestRefused, Structure, StructureKind
from tests.support.byte_tokenizer import EOS, byte_grammars
from tests.support.engine_core import Output, make_core, make_request, take
from tests.support.paged_runner import PagedRunner
from tests.support.tiny_models import make_tokenizer

LONG = 3000  # tokens
SCHEMAS: dict[str, dict[str, Any]] = {
    "fee": {
        "type": "object",
        "properties": {"of": {"$ref": "#/$defs/P"}, "when": {"anyOf": [{"type": "null"}, {"const": '"}</tool_call>'}]}},
        "required": ["of", "when"],
        "additionalProperties": False,
        "$defs": {"P": {"enum": ["card", "account"]}},
    },
    "now-2": {"type": "object", "properties": {}, "additionalProperties": False},
}
FUNCTIONS = tuple(Function(name, json.dumps(schema)) for name, schema in SCHEMAS.items())
CHOICE = Structure(StructureKind.CHOICE, '["yes", "no"]')
DIALECTS = [Dialect(ToolFormat.HERMES, thinks=True), Dialect(ToolFormat.LLAMA3_JSON, thinks=True)]


def generate(core: EngineCore, structure: Structure, seed: int) -> Output:
    output = Output()
    core.add(make_request("r", [65], LONG, seed=seed, structure=structure), byte_grammars().compile(structure))
    while core.has_work:
        for emission in core.step():
            assert emission.failure is None
            take(output, emission.delta)
    return output


def read(text: str, dialect: Dialect, thinking: Thinking, *, calls: bool) -> tuple[str, str, list[tuple[str, Any]]]:
    """Return thoughts, words, and calls whose arguments their schema allows."""
    parser = MessageParser(dialect, thinking, calls=calls)
    parts = [*parser.push(text), *parser.finish()]
    called = [part.name for part in parts if isinstance(part, CallBegun)]
    pieces = [part.text for part in parts if isinstance(part, CallArguments)]
    for name, piece in zip(called, pieces, strict=True):
        jsonschema.validate(json.loads(piece), SCHEMAS[name])
    thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
    words = "".join(part.text for part in parts if isinstance(part, Words))
    return thoughts, words, list(zip(called, pieces, strict=True))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("thinking", Thinking)
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("form", [None, CHOICE])
def test_whatever_is_drawn_a_message_reads_as_what_was_allowed(
    dialect: Dialect, thinking: Thinking, required: bool, form: Structure | None
) -> None:
    use = ToolUse(FUNCTIONS, required, parallel=True)
    structure = message_structure(dialect, thinking, use, form)
    assert structure is not None
    ended = 0
    for seed in range(4):
        output = generate(bytes_core(), structure, seed)
        if output.finish_reason is not FinishReason.STOP:
            continue
        ended += 1
        thoughts, words, calls = read(output.text, dialect, thinking, calls=True)
        assert not (thoughts and thinking is Thinking.NEVER)
        assert len(calls) <= MAX_CALLS
        if required:
            assert calls
            assert not words
        elif form is not None:
            assert (words in ("yes", "no")) != bool(calls)
    assert ended or thinking is Thinking.BEGUN  # a random model does not spell the end of its thoughts


def bytes_core() -> EngineCore:
    return make_core(runner=PagedRunner(2048, 258), vocabulary_size=258, context_length=LONG + 8)


def accepts(structure: Structure | None, text: str) -> bool:
    """Return whether `text` may be written, and end there."""
    assert structure is not None
    state = byte_grammars().compile(structure)()
    for byte in text.encode():
        state.take(byte)
    return state.mask is not None and bool(state.mask[EOS // 8] >> EOS % 8 & 1)


THOUGHTS = f"{THINK}\nhm, <tool_call>?\n{THOUGHT}\n\n"
NOW = f'{CALL}\n{{"name": "now-2", "arguments": {{}}}}\n{CALLED}'


@pytest.mark.parametrize(
    ("thinking", "text", "allowed"),
    [
        (Thinking.MAYBE, f"{THOUGHTS}yes", True),
        (Thinking.MAYBE, f"{THOUGHTS}{NOW}\n{NOW}", True),
        (Thinking.MAYBE, "no", True),
        (Thinking.MAYBE, NOW, True),
        (Thinking.MAYBE, f"{THOUGHTS}{THOUGHTS}yes", False),
        (Thinking.MAYBE, THOUGHTS, False),
        (Thinking.MAYBE, "maybe", False),
        (Thinking.MAYBE, f"yes{NOW}", False),
        (Thinking.NEVER, f"{THOUGHTS}yes", False),
        (Thinking.NEVER, "yes", True),
        (Thinking.BEGUN, THOUGHTS.removeprefix(THINK) + "yes", True),
        (Thinking.BEGUN, "yes", False),
    ],
)
def test_a_form_and_calls_come_after_the_thoughts(thinking: Thinking, text: str, allowed: bool) -> None:
    structure = message_structure(DIALECTS[0], thinking, ToolUse(FUNCTIONS, False, True), CHOICE)
    assert accepts(structure, text) is allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (f"Look at <tools>. {NOW}\n{NOW}", True),
        (NOW, True),
        ("Only words, <tool_call", True),
        ("", True),
        (f"{NOW} words", False),
        (f"words {NOW.replace('now-2', 'then')}", False),
        (f"words {NOW.replace('{}', '[]')}", False),
        ("\n".join([NOW] * MAX_CALLS), True),
        ("\n".join([NOW] * (MAX_CALLS + 1)), False),
    ],
)
def test_words_may_stand_before_calls_and_a_call_once_begun_is_kept_to(text: str, allowed: bool) -> None:
    structure = message_structure(DIALECTS[0], Thinking.NEVER, ToolUse(FUNCTIONS, False, True), None)
    assert accepts(structure, text) is allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('{"name": "now-2", "parameters": {}}', True),
        ('{"name": "now-2", "parameters": {}}; {"name": "now-2", "parameters": {}}', True),
        ('{"name": "then", "parameters": {}}', False),
        ('{"answer": 1} and {"name": "then"}', True),
        (' {"name"', False),
    ],
)
def test_llama_calls_are_kept_to_from_their_first_name(text: str, allowed: bool) -> None:
    structure = message_structure(DIALECTS[1], Thinking.NEVER, ToolUse(FUNCTIONS, False, True), None)
    assert accepts(structure, text) is allowed


def test_where_nothing_is_called_a_form_is_itself_or_follows_the_thoughts() -> None:
    assert message_structure(DIALECTS[0], Thinking.NEVER, None, CHOICE) == CHOICE
    assert message_structure(DIALECTS[0], Thinking.MAYBE, None, None) is None
    after = message_structure(DIALECTS[0], Thinking.BEGUN, None, CHOICE)
    assert accepts(after, f"hm{THOUGHT}\nno")
    assert not accepts(after, "no")


def test_one_call_is_one_where_calls_are_not_parallel() -> None:
    structure = message_structure(DIALECTS[0], Thinking.NEVER, ToolUse(FUNCTIONS[1:], True, False), None)
    assert structure is not None
    written = '{"name": "now-2", "arguments": {}}'
    assert generate(bytes_core(), structure, 1).text == f"{CALL}\n{written}\n{CALLED}"
    for dialect in DIALECTS:
        structure = message_structure(dialect, Thinking.NEVER, ToolUse(FUNCTIONS, True, False), None)
        assert structure is not None
        assert len(read(generate(bytes_core(), structure, 2).text, dialect, Thinking.NEVER, calls=True)[2]) == 1


def test_tags_that_are_one_token_are_asked_for_as_such_and_cannot_be_spelt_in_words() -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in (THINK, THOUGHT, CALL, CALLED)])
    grammars = Grammars.of(tokenizer.backend_tokenizer.to_str(), len(tokenizer), [2])
    assert grammars is not None
    dialect = Dialect(ToolFormat.HERMES, True, frozenset((THINK, THOUGHT, CALL, CALLED)))
    structure = message_structure(dialect, Thinking.MAYBE, ToolUse(FUNCTIONS[1:], False, False), None)
    assert structure is not None
    text = f'{THINK}hm{THOUGHT}\n\nI look.{CALL}\n{{"name": "now-2", "arguments": {{}}}}\n{CALLED}'
    state = grammars.compile(structure)()
    for token in tokenizer.encode(text, add_special_tokens=False):
        state.take(token)
        assert not state.failed
    for words in ("<tool_", "call", ">"):  # in letters, which the parser could not tell from the token
        state = grammars.compile(structure)() if words == "<tool_" else state
        for token in tokenizer.encode(words, add_special_tokens=False):
            state.take(token)
    assert state.failed


def test_a_schema_that_cannot_be_enforced_is_refused_by_its_keyword() -> None:
    secret = Function("f", json.dumps({"type": "object", "not": {"const": "wombat"}}))
    structure = message_structure(DIALECTS[0], Thinking.NEVER, ToolUse((*FUNCTIONS, secret), False, True), None)
    assert structure is not None
    with pytest.raises(RequestRefused, match="`not`") as refused:
        byte_grammars().compile(structure)
    assert "wombat" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("{{ messages }}", Dialect()),
        ("{% if tools %}<tools>…</tools> within <tool_call></tool_call>{% endif %}", Dialect(ToolFormat.HERMES)),
        ("{% if tools %}<tool_call>{% endif %}{{ x.split('</think>') }}", Dialect(ToolFormat.HERMES, thinks=True)),
        ('{% if tools %}{"name": n, "parameters": p}ipython{% endif %}', Dialect(ToolFormat.LLAMA3_JSON)),
        ("{{ x.split('</think>') }}<think>\n", Dialect(thinks=True)),
    ],
)
def test_a_template_shows_its_dialect(template: str, dialect: Dialect) -> None:
    assert Dialect.of(template, ()) == dialect


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("<|im_start|>assistant\n", Thinking.MAYBE),
        ("<|im_start|>assistant\n<think>\n", Thinking.BEGUN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Thinking.NEVER),
    ],
)
def test_whether_there_are_thoughts_is_read_from_the_prompt(prompt: str, thinking: Thinking) -> None:
    assert DIALECTS[0].thinking(prompt) is thinking
    assert Dialect().thinking(prompt) is Thinking.NEVER
