"""Tools through the official client and LangChain: enforced, on record as written, replayed; refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

from engine.dialect import CALL, CALLED, THINK, THOUGHT, Dialect, ToolFormat
from tests.support.byte_tokenizer import byte_grammars
from tests.support.engine_core import make_core
from tests.support.engine_runtime import make_runtime
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.paged_runner import PagedRunner
from tests.support.scripted_engine import ScriptedEngine
from tests.support.sdk import ask, ask_raw, openai_client
from tests.support.tenant import MODEL

QUESTION = "What does a card cost?"
CANARY = "a-canary-in-the-tools"
HERMES = Dialect(ToolFormat.HERMES, thinks=True)
FEE: dict[str, Any] = {
    "type": "object",
    "properties": {"of": {"$ref": "#/$defs/Product"}, "months": {"type": "integer", "minimum": 1, "maximum": 24}},
    "required": ["of", "months"],
    "additionalProperties": False,
    "$defs": {"Product": {"enum": ["card", "account"]}},
}
HOURS: dict[str, Any] = {"type": "object", "properties": {"day": {"enum": ["mo", "tu"]}}, "required": ["day"]}
HOURS["additionalProperties"] = False


def function(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Look it up.", "parameters": parameters}}


TOOLS = [function("fee", FEE), function("hours", HOURS)]
NAMED = {"type": "function", "function": {"name": "hours"}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A random model that knows tools: what it writes is decided by the grammar and the seed alone."""
    core = make_core(runner=PagedRunner(2048, 258), clock=time.monotonic, vocabulary_size=258, context_length=8192)
    dialect = Dialect(ToolFormat.HERMES)
    engine = make_runtime(core, grammars=byte_grammars(), dialect=dialect)
    with running_gateway(tmp_path_factory.mktemp("tools"), engine) as running:
        yield running


def arguments(call: Any) -> Any:
    """Return a call's arguments, which its function's schema allows."""
    read = json.loads(call.function.arguments)
    jsonschema.validate(read, {"fee": FEE, "hours": HOURS}[call.function.name])
    return read


def test_a_required_call_is_of_an_offered_function_with_arguments_that_its_schema_allows(
    client: openai.OpenAI,
) -> None:
    called = set()
    for seed in range(6):
        asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        (choice,) = ask(client, QUESTION, temperature=1.5, max_tokens=400, **asked).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert arguments(call)
        called.add(call.function.name)
    assert called == {"fee", "hours"}  # it is the model that chooses


def test_a_named_function_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    for seed in range(3):
        (choice,) = ask(client, QUESTION, tools=TOOLS, tool_choice=NAMED, seed=seed, max_tokens=400).choices
        (call,) = choice.message.tool_calls
        assert call.function.name == "hours"
        assert arguments(call)


def test_calls_stream_in_pieces_that_make_the_same_calls_and_each_choice_has_its_own(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "seed": 11, "n": 2, "max_tokens": 900}
    whole = ask(client, QUESTION, **asked)
    streamed: list[list[dict[str, Any]]] = [[], []]
    reasons: list[str | None] = [None, None]
    for chunk in ask(client, QUESTION, stream=True, **asked):
        for part in chunk.choices:
            reasons[part.index] = part.finish_reason or reasons[part.index]
            for piece in part.delta.tool_calls or ():
                calls = streamed[part.index]
                if piece.index == len(calls):
                    calls.append({"id": piece.id, "name": piece.function.name, "arguments": ""})
                calls[piece.index]["arguments"] += piece.function.arguments
    for choice in whole.choices:
        calls = streamed[choice.index]
        assert [(call["name"], call["arguments"]) for call in calls] == [
            (call.function.name, call.function.arguments) for call in choice.message.tool_calls
        ]
        assert reasons[choice.index] == choice.finish_reason
    ids = [call["id"] for calls in streamed for call in calls]
    assert len(set(ids)) == len(ids)


def test_a_call_is_on_record_as_the_model_wrote_it_and_replays_identically(
    client: openai.OpenAI, auditor: Hand
) -> None:
    response = ask_raw(client, QUESTION, tools=TOOLS, tool_choice="required", seed=3, max_tokens=600)
    request_id = response.headers["x-request-id"]
    (choice,) = response.parse().choices
    revealed = auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "test"}).raise_for_status().json()
    for call in choice.message.tool_calls:
        assert f'"name": "{call.function.name}", "arguments": {call.function.arguments}' in revealed["output"][0]
    story = auditor.get(f"/audit/requests/{request_id}").raise_for_status().json()
    assert story["sampling"]["structure"] == "message"
    assert "months" not in json.dumps(story)  # what the tools are is content
    for mode in ("regenerate", "forced"):
        outcome = auditor.post(f"/audit/requests/{request_id}:replay", {"mode": mode}).raise_for_status().json()
        assert outcome["outcome"] == "identical"


def test_words_may_follow_a_form_while_calls_are_offered_too(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    seen = set()
    for seed in range(12):
        (choice,) = ask(client, QUESTION, tools=TOOLS, response_format=form, seed=seed, max_tokens=900).choices
        seen.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), schema)
    assert seen >= {"stop", "tool_calls"}


@pytest.mark.parametrize(
    ("asked", "param", "named"),
    [
        ({"tools": [function("f", {"type": "object", "not": {"const": CANARY}})]}, "tools", "`not`"),
        ({"tools": [function("f", {"type": "string"})]}, "tools.0.function.parameters", "`object`"),
        ({"tools": [function("f"), function("f")]}, "tools", "one name"),
        ({"tools": [function(f"{CANARY} is no name")]}, "tools.0.function.name", "letters"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": CANARY}}}, "tool_choice", "among"),
        ({"tool_choice": "required"}, "tool_choice", "among"),
        ({"tools": TOOLS, "extra_body": {"structured_outputs": {"regex": "a"}}}, None, "two things"),
        ({"tools": TOOLS, "extra_body": {"min_tokens": 3}}, "min_tokens", "structure"),
        ({"messages": [{"role": "tool", "content": CANARY}]}, "messages.0", "tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages.0", "`content`"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": f"[{CANARY}"}}]}]},
         "messages.0.tool_calls.0.function.arguments", "JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_by_name_and_not_repeated(
    client: openai.OpenAI, asked: dict[str, Any], param: str | None, named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, QUESTION, **asked)
    assert (refused.value.code, refused.value.param) == ("invalid_request", param)
    assert named in refused.value.message
    assert CANARY not in refused.value.message


def hermes_call(name: str, text: str) -> str:
    return f'{CALL}\n{{"name": "{name}", "arguments": {text}}}\n{CALLED}'


@pytest.fixture
def scripted(tmp_path: Any) -> Iterator[tuple[ScriptedEngine, RunningGateway]]:
    """A model that thinks, calls twice, and answers once it has a result."""

    def reply(prompt: str) -> str:
        if "<tool>" in prompt:
            return f"{THINK}\nI have it.\n{THOUGHT}\n\nA card costs two euros."
        calls = hermes_call("fee", '{"of": "card", "months": 12}') + "\n" + hermes_call("hours", '{"day": "mo"}')
        return f"{THINK}\nI must look.\n{THOUGHT}\n\nLet me look.{calls}"

    engine = ScriptedEngine(reply, dialect=HERMES)
    with running_gateway(tmp_path, engine) as running:
        yield engine, running


def test_a_whole_round_with_the_answer_sent_back_as_it_came(scripted: tuple[ScriptedEngine, RunningGateway]) -> None:
    engine, running = scripted
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with openai_client(running, "app") as client:
        (choice,) = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices  # type: ignore[arg-type]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
        assert choice.message.reasoning_content == "I must look."  # type: ignore[attr-defined]
        assert [call.function.name for call in choice.message.tool_calls or ()] == ["fee", "hours"]  # type: ignore[union-attr]
        messages.append(choice.message)
        for call in choice.message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "two euros"})
        (choice,) = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices  # type: ignore[arg-type]
        assert (choice.finish_reason, choice.message.content) == ("stop", "A card costs two euros.")
        assert choice.message.tool_calls is None
    assert '<tools>[{"type": "function", "function": {"name": "fee", "description": "Look it up."' in engine.prompts[0]
    assert "<tool>two euros" in engine.prompts[1]


def test_a_model_that_may_call_nothing_is_shown_no_tools(scripted: tuple[ScriptedEngine, RunningGateway]) -> None:
    engine, running = scripted
    with openai_client(running, "app") as client:
        (choice,) = ask(client, QUESTION, tools=TOOLS, tool_choice="none").choices
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith(f"Let me look.{CALL}")  # it calls all the same; to us these are words
    assert "<tools>" not in engine.prompts[0]


def test_an_identifier_in_the_arguments_of_a_call_is_redacted_before_it_leaves(tmp_path: Any) -> None:
    written = hermes_call("fee", '{"of": "jane.roe@example.com", "months": 2}')
    sections = (
        "guardrails:\n  mail: {detector: pii, stage: output, action: redact, entities: [email],"
        " streaming: {mode: window, hold_chars: 321}, on_error: block}"
    )
    engine = ScriptedEngine(lambda _: written, dialect=HERMES)
    with (
        running_gateway(tmp_path, engine, obligations="guardrails: [mail]", sections=sections) as running,
        openai_client(running, "app") as client,
    ):
        (choice,) = ask(client, QUESTION, tools=TOOLS).choices
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"of": "[EMAIL]", "months": 2}


def test_a_model_without_tools_says_so(tmp_path: Any) -> None:
    core = make_core(runner=PagedRunner(64, 258), clock=time.monotonic, vocabulary_size=258)
    with (
        running_gateway(tmp_path, make_runtime(core, grammars=byte_grammars())) as running,
        openai_client(running, "app") as client,
        pytest.raises(openai.BadRequestError, match="knows no tools") as refused,
    ):
        ask(client, QUESTION, tools=TOOLS)
    assert refused.value.param == "tools"


class Fee(BaseModel):
    """What a product costs."""

    model_config = ConfigDict(extra="forbid")

    of: Literal["card", "account"]
    months: Literal[1, 12]


def langchain(running: RunningGateway, **more: Any) -> ChatOpenAI:
    key: Any = running.credential("app")
    return ChatOpenAI(base_url=f"{running.url}/v1", api_key=key, model=MODEL, max_retries=0, timeout=60, **more)


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_gets_the_object_that_it_asked_for(
    gateway: RunningGateway, method: Literal["function_calling", "json_schema"]
) -> None:
    chain = langchain(gateway, seed=5, temperature=1.2).with_structured_output(Fee, method=method)
    assert isinstance(chain.invoke(QUESTION), Fee)


def test_langchain_binds_tools_streams_calls_and_sends_results_back(
    scripted: tuple[ScriptedEngine, RunningGateway],
) -> None:
    engine, running = scripted

    @tool
    def fee(of: str, months: int) -> str:
        """Look up a fee."""
        return f"{months} x {of}"

    @tool
    def hours(day: str) -> str:
        """Look up opening hours."""
        return day

    bound = langchain(running).bind_tools([fee, hours])
    first = None
    for chunk in bound.stream(QUESTION):
        first = chunk if first is None else first + chunk
    assert isinstance(first, AIMessage)
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [
        ("fee", {"of": "card", "months": 12}),
        ("hours", {"day": "mo"}),
    ]
    results = [ToolMessage(fee.invoke(call) if call["name"] == "fee" else "9", tool_call_id=call["id"])  # type: ignore[arg-type]
               for call in first.tool_calls]  # fmt: skip
    answer = bound.invoke([HumanMessage(QUESTION), AIMessage(first.content, tool_calls=first.tool_calls), *results])
    assert answer.content == "A card costs two euros."
    assert "12 x card" in engine.prompts[1]
