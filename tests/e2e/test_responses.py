"""`/v1/responses` through the official client: the same governed chat, in items and typed events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel, ConfigDict

from engine.dialect import CALL, CALLED, THINK, THOUGHT, Dialect, ToolFormat
from tests.support.byte_tokenizer import byte_grammars
from tests.support.engine_core import make_core
from tests.support.engine_runtime import make_runtime
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.paged_runner import PagedRunner
from tests.support.scripted_engine import ScriptedEngine
from tests.support.sdk import openai_client
from tests.support.tenant import MODEL

QUESTION = "What does a card cost?"
CANARY = "a-canary-in-the-input"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"of": {"enum": ["card", "account"]}},
    "required": ["of"],
    "additionalProperties": False,
}
FEE: Any = {"type": "function", "name": "fee", "description": "Look it up.", "parameters": SCHEMA, "strict": True}


def reply(prompt: str) -> str:
    if "<tool>" in prompt:
        return f"{THINK}\nI have it.\n{THOUGHT}\n\nA card costs two euros."
    call = f'{CALL}\n{{"name": "fee", "arguments": {{"of": "card"}}}}\n{CALLED}'
    return f"{THINK}\nI must look.\n{THOUGHT}\n\nLet me look.{call}\n{call}" if "tools" in prompt else "Two euros."


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedEngine, RunningGateway]]:
    engine = ScriptedEngine(reply, dialect=Dialect(ToolFormat.HERMES, thinks=True))
    with running_gateway(tmp_path_factory.mktemp("scripted"), engine) as running:
        yield engine, running


@pytest.fixture(scope="module")
def client(scripted: tuple[ScriptedEngine, RunningGateway]) -> Iterator[openai.OpenAI]:
    with openai_client(scripted[1], "app") as opened:
        yield opened


def test_a_question_is_answered_with_a_message_and_its_counts(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION, instructions="Be brief.", store=False)
    assert (response.status, response.output_text, response.error) == ("completed", "Two euros.", None)
    assert response.instructions == "Be brief."
    assert response.usage is not None
    assert response.usage.output_tokens == len("Two euros.")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_an_answer_that_is_cut_short_says_why(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", "Two")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_whole_round_of_thoughts_words_and_calls_sent_back_as_it_came(
    scripted: tuple[ScriptedEngine, RunningGateway], client: openai.OpenAI
) -> None:
    conversation: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    first = client.responses.create(model=MODEL, input=conversation, tools=[FEE])
    thoughts, words, *calls = first.output
    assert isinstance(thoughts, ResponseReasoningItem)
    assert thoughts.content is not None
    assert [part.text for part in thoughts.content] == ["I must look."]
    assert isinstance(words, ResponseOutputMessage)
    assert first.output_text == "Let me look."
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens == len("I must look.")
    conversation += first.output
    for call in calls:
        assert isinstance(call, ResponseFunctionToolCall)
        assert (call.name, json.loads(call.arguments)) == ("fee", {"of": "card"})
        conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "two euros"})
    second = client.responses.create(model=MODEL, input=conversation, tools=[FEE])
    assert second.output_text == "A card costs two euros."
    assert "<assistant>Let me look.\n<tool>two euros\n<tool>two euros\n" in scripted[0].prompts[-1]


def test_a_stream_tells_of_every_item_and_ends_with_the_whole_response(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": QUESTION, "tools": [FEE]}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type] == ["response.created", "response.in_progress"]
    final: Response = events[-1].response  # type: ignore[union-attr]
    assert events[-1].type == "response.completed"
    assert [kind_and_text(item) for item in final.output] == [kind_and_text(item) for item in whole.output]
    heard: dict[int, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            heard[event.output_index] = heard.get(event.output_index, "") + event.delta  # type: ignore[union-attr]
    assert [text for _, text in sorted(heard.items())] == [kind_and_text(item)[1] for item in final.output]
    opened = [event.item.id for event in events if event.type == "response.output_item.added"]
    closed = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert opened == closed == [item.id for item in final.output]


def kind_and_text(item: Any) -> tuple[str, str]:
    if item.type == "function_call":
        return item.type, item.arguments
    return item.type, "".join(part.text for part in item.content)


def test_the_client_s_own_stream_helper_follows(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, tools=[FEE]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "Let me look."


def test_the_record_says_responses_and_holds_the_body_as_sent(
    scripted: tuple[ScriptedEngine, RunningGateway], client: openai.OpenAI
) -> None:
    raw = client.responses.with_raw_response.create(model=MODEL, input=QUESTION, user="jane")
    auditor = Hand(scripted[1], "auditor")
    request_id = raw.headers["x-request-id"]
    assert raw.parse().id == f"resp_{request_id}"
    revealed = auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "test"}).raise_for_status().json()
    assert json.loads(revealed["prompt"]) == {"model": MODEL, "input": QUESTION, "user": "jane"}
    assert revealed["output"] == ["Two euros."]


@pytest.mark.parametrize(
    ("asked", "param", "named"),
    [
        ({"store": True}, "store", "not supported"),
        ({"previous_response_id": CANARY}, "previous_response_id", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": CANARY}, "conversation", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", ""),
        ({"tools": [FEE, FEE]}, "tools", "one name"),
        ({"tool_choice": "required"}, "tool_choice", "among"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": CANARY}]}]}, "input", ""),
        ({"input": []}, "input", ""),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": f"{{{CANARY}"}]},
         "messages.0.tool_calls.0.function.arguments", "JSON object"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", ""),
        ({"top_logprobs": 3}, None, "include"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "schema"),
        ({"input": "x" * 5000}, "input", "4096"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", ""),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name_and_not_repeated(
    client: openai.OpenAI, asked: dict[str, Any], param: str | None, named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"model": MODEL, "input": QUESTION, **asked})
    assert (refused.value.param or "").startswith(param or "")
    assert (refused.value.param is None) == (param is None)
    assert named in refused.value.message
    assert CANARY not in refused.value.message


class Fee(BaseModel):
    model_config = ConfigDict(extra="forbid")

    of: Literal["card", "account"]


def test_a_schema_is_parsed_into_a_model_and_the_answer_replays(tmp_path: Path) -> None:
    core = make_core(runner=PagedRunner(2048, 258), clock=time.monotonic, vocabulary_size=258)
    engine = make_runtime(core, grammars=byte_grammars(), dialect=Dialect(ToolFormat.HERMES))
    with running_gateway(tmp_path, engine) as running, openai_client(running, "app") as client:
        parsed = client.responses.parse(
            model=MODEL,
            input=QUESTION,
            text_format=Fee,
            extra_body={"seed": 4},
            include=["message.output_text.logprobs"],
        )
        assert isinstance(parsed.output_parsed, Fee)
        message = parsed.output[0]
        assert isinstance(message, ResponseOutputMessage)
        tokens = "".join(entry.token for entry in message.content[0].logprobs or ())  # type: ignore[union-attr]
        assert tokens.removesuffix("<eos>") == parsed.output_text
        auditor = Hand(running, "auditor")
        request_id = parsed.id.removeprefix("resp_")
        for mode in ("regenerate", "forced"):
            again = auditor.post(f"/audit/requests/{request_id}:replay", {"mode": mode}).raise_for_status().json()
            assert again["outcome"] == "identical"
        key: Any = running.credential("app")
        chat = ChatOpenAI(base_url=f"{running.url}/v1", api_key=key, model=MODEL, use_responses_api=True, max_retries=0)
        called = chat.bind_tools([FEE], tool_choice="fee").invoke(QUESTION)
        assert isinstance(called, AIMessage)
        assert Fee.model_validate(called.tool_calls[0]["args"])
