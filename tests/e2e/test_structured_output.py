"""Structured answers through the official client: kept to, on record, replayed; refused by name where it cannot be."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.support.byte_tokenizer import byte_grammars
from tests.support.engine_core import make_core
from tests.support.engine_runtime import make_runtime
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.paged_runner import PagedRunner
from tests.support.sdk import ask, ask_raw, streamed_text
from tests.support.tenant import MODEL

QUESTION = "Summarise this complaint."
CANARY = "a-canary-in-the-schema"
UNENFORCED = {"not": {"const": CANARY}}


class Summary(BaseModel):
    model_config = {"extra": "forbid"}

    topic: Literal["fees", "cards", "transfers"]
    urgent: bool
    points: list[Literal["late", "wrong", "lost"]]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    core = make_core(runner=PagedRunner(1024, 258), clock=time.monotonic, vocabulary_size=258)
    engine = make_runtime(core, grammars=byte_grammars())
    with running_gateway(tmp_path_factory.mktemp("structured"), engine) as running:
        yield running


def test_the_client_parses_an_answer_into_the_model_it_asked_for(client: openai.OpenAI) -> None:
    answers = set()
    for seed in range(5):
        answer = client.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            response_format=Summary,
            seed=seed,
            temperature=1.5,
            max_tokens=400,
        )
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, Summary)
        answers.add(parsed.topic)
    assert len(answers) > 1  # it is the model that chooses


@pytest.mark.parametrize(
    ("outputs", "form"),
    [
        ({"choice": ["approve", "refuse"]}, r"approve|refuse"),
        ({"regex": r"[A-Z]{2}-[0-9]{4}"}, r"[A-Z]{2}-[0-9]{4}"),
        ({"grammar": 'start: "a" "b"~3'}, r"abbb"),
        ({"json": {"enum": [1, "zwei"]}}, r'1|"zwei"'),
    ],
)
def test_the_other_structures_are_kept_to_and_replay_identically(
    client: openai.OpenAI, auditor: Hand, outputs: dict[str, Any], form: str
) -> None:
    response = ask_raw(client, QUESTION, max_tokens=60, seed=4, extra_body={"structured_outputs": outputs})
    content = response.parse().choices[0].message.content
    assert content is not None
    assert re.fullmatch(form, content)
    request_id = response.headers["x-request-id"]
    story = auditor.get(f"/audit/requests/{request_id}").raise_for_status().json()
    kinds = {"choice": "choice", "regex": "regex", "grammar": "lark", "json": "json_schema"}
    assert story["sampling"]["structure"] == kinds[next(iter(outputs))]
    assert "approve" not in json.dumps(story)  # what was asked for is content
    for mode in ("regenerate", "forced"):
        outcome = auditor.post(f"/audit/requests/{request_id}:replay", {"mode": mode}).raise_for_status().json()
        assert outcome["outcome"] == "identical"


def test_a_json_object_is_one_streamed_or_not_and_for_every_choice(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}, "max_tokens": 900, "seed": 1}
    for choice in ask(client, QUESTION, n=3, **asked).choices:
        assert choice.message.content is not None
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        assert choice.message.content.startswith("{")
    streamed = streamed_text(ask(client, QUESTION, stream=True, **asked))
    assert streamed == ask(client, QUESTION, **asked).choices[0].message.content


@pytest.mark.parametrize(
    ("asked", "param", "named"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": UNENFORCED}}},
         "response_format", "`not`"),
        ({"extra_body": {"structured_outputs": {"regex": f"({CANARY}"}}}, "structured_outputs", "not valid"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs", "one of"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, "ignore_eos", "left out"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"structured_outputs": {"regex": "a"}}},
         "structured_outputs", "two things"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ],
)  # fmt: skip
def test_a_structure_that_cannot_be_is_refused_by_name_and_not_repeated(
    client: openai.OpenAI, asked: dict[str, Any], param: str, named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, QUESTION, **asked)
    assert (refused.value.code, refused.value.param) == ("invalid_request", param)
    assert named in refused.value.message
    assert CANARY not in refused.value.message


def test_a_grammar_that_becomes_too_much_work_is_that_request_s_failure_and_on_record(
    client: openai.OpenAI, auditor: Hand
) -> None:
    ambiguous = 'start: (a|b|c)* "!"\na: x a x | x\nb: x b | b x | x\nc: c c c | x\nx: /[^!]/'
    with pytest.raises(openai.BadRequestError, match="too complex") as refused:
        # With this seed the end does not come before it has become too much.
        ask(client, QUESTION, seed=19, max_tokens=1500, extra_body={"structured_outputs": {"grammar": ambiguous}})
    assert refused.value.code == "invalid_request"
    request_id = refused.value.response.headers["x-request-id"]
    assert auditor.get(f"/audit/requests/{request_id}").raise_for_status().json()["status"] == "failed"
    assert ask(client, QUESTION, max_tokens=5).choices[0].message.content is not None  # the engine goes on
