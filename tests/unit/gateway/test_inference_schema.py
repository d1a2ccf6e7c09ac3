"""The bodies of inference: what asks for nothing is let by, what cannot be honoured is refused by its own name."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.error_responses import invalid_fields
from gateway.errors import ApiError
from gateway.schemas.inference import ChatRequest, CompletionRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "hello"}
CANARY = "wombat-5fe1"


def refused(kind: type[ChatRequest] | type[CompletionRequest], body: Any) -> ApiError:
    with pytest.raises(ValidationError) as invalid:
        kind.model_validate(body)
    return invalid_fields(invalid.value, kind)


def test_a_request_that_says_no_more_than_it_must_has_the_defaults() -> None:
    chat = ChatRequest.model_validate(CHAT)
    assert (chat.choices, chat.stops, chat.token_limit, chat.stream, chat.include_usage) == (1, (), None, False, False)
    assert (chat.wants_logprobs, chat.alternatives, chat.seed) == (False, 0, None)
    plain = CompletionRequest.model_validate(PLAIN)
    assert (plain.text, plain.wants_logprobs) == ("hello", False)


def test_null_asks_for_nothing_wherever_it_stands() -> None:
    names = ("max_tokens", "temperature", "top_p", "n", "seed", "stop", "user", "metadata", "stream_options", "tools")
    assert ChatRequest.model_validate(CHAT | dict.fromkeys(names)).choices == 1


@pytest.mark.parametrize(
    ("name", "neutral", "asking"),
    [
        ("functions", [], [{}]),
        ("function_call", "auto", {"name": "f"}),
        ("modalities", ["text"], ["audio"]),
        ("store", False, True),
        ("service_tier", "default", "flex"),
        ("best_of", 1, 2),
        ("echo", False, True),
        ("suffix", "", "end"),
    ],
)
def test_a_field_not_honoured_yet_is_let_by_when_it_asks_for_nothing(name: str, neutral: Any, asking: Any) -> None:
    for kind, body in ((ChatRequest, CHAT), (CompletionRequest, PLAIN)):
        kind.model_validate(body | {name: neutral})
        kind.model_validate(body | {name: None})
        error = refused(kind, body | {name: asking})
        assert error.param == name
        assert name in error.message


def test_what_bends_the_choice_of_tokens_is_read_into_one_form() -> None:
    asked = {"logit_bias": {"7": -100, "0": 2.5, "12": 0}, "stop_token_ids": [9, 3, 9], "allowed_token_ids": [5, 4]}
    for kind, body in ((ChatRequest, CHAT), (CompletionRequest, PLAIN)):
        request = kind.model_validate(body | asked)
        assert request.biases == ((0, 2.5), (7, -100.0))
        assert (request.stop_tokens, request.allowed_tokens) == ((3, 9), (4, 5))
        plain = kind.model_validate(body | {"logit_bias": {}})
        assert (plain.biases, plain.stop_tokens, plain.allowed_tokens, plain.min_tokens) == ((), (), (), None)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"presence_penalty": 2.01}, "presence_penalty"),
        ({"frequency_penalty": -2.01}, "frequency_penalty"),
        ({"frequency_penalty": "NaN"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"7": 101}}, "logit_bias"),
        ({"logit_bias": {"07": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": list(range(17))}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids.0"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [2**31]}, "allowed_token_ids.0"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"temperature": 2.01}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 257]}, "stop"),
        ({"user": "x" * 257}, "user"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"model": ""}, "model"),
        ({"model": "x" * 129}, "model"),
        ({"model": "a\0"}, "model"),
        ({"model": None}, "model"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"ignore_eos": "no"}, "ignore_eos"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name_on_both_endpoints(changes: dict[str, Any], param: str) -> None:
    for kind, body in ((ChatRequest, CHAT), (CompletionRequest, PLAIN)):
        found = refused(kind, body | changes).param or ""
        assert found == param or found.startswith(f"{param}.")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        CANARY,
        [CANARY],
        [{"role": "user"}],
        [{"content": CANARY}],
        [{"role": CANARY, "content": "x"}],
        [{"role": "tool", "content": CANARY}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": CANARY}}]}],
        [{"role": "user", "content": CANARY, "tool_calls": []}],
        [{"role": "user", "content": CANARY, "name": CANARY * 10}],
        [{"role": "user", "content": "x"}] * 4097,
    ],
)
def test_messages_that_cannot_be_rendered_are_refused_without_an_echo(messages: Any) -> None:
    error = refused(ChatRequest, CHAT | {"messages": messages})
    assert (error.param or "").startswith("messages")
    assert CANARY not in error.message + (error.param or "")


@pytest.mark.parametrize("body", [None, [], CANARY, 7, {CANARY: 1}, CHAT | {CANARY: CANARY}])
def test_a_body_of_another_shape_is_refused_without_an_echo(body: Any) -> None:
    error = refused(ChatRequest, body)
    assert CANARY not in error.message + (error.param or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"top_logprobs": 3},
        {"logprobs": False, "top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": 1},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        {"prompt": "of the other endpoint"},
    ],
)
def test_chat_fields_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    assert refused(ChatRequest, CHAT | changes).code == "invalid_request"


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": []},
        {"prompt": ["a", "b"]},
        {"prompt": [1, 2, 3]},
        {"prompt": None},
        {"logprobs": 6},
        {"logprobs": True},
        {"max_completion_tokens": 5},
        {"messages": CHAT["messages"]},
    ],
)
def test_plain_completions_take_one_text_and_their_own_fields_only(changes: dict[str, Any]) -> None:
    assert refused(CompletionRequest, PLAIN | changes).code == "invalid_request"


def test_parts_of_a_message_are_one_text_and_a_stop_is_a_list() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    chat = ChatRequest.model_validate(CHAT | {"messages": [{"role": "developer", "content": parts}], "stop": "x"})
    assert chat.messages[0].text == "one two"
    assert chat.stops == ("x",)
    assert CompletionRequest.model_validate(PLAIN | {"prompt": ["one"]}).text == "one"


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
@pytest.mark.parametrize("number", ["0." + "4" * 25, "0." + "0" * 70_000 + "1", 1e-30])
def test_a_number_of_more_digits_than_a_leaf_should_hold_is_refused(name: str, number: object) -> None:
    error = refused(ChatRequest, CHAT | {name: number})
    assert (error.param, error.message) == (name, f"`{name}`: is not valid")


def test_every_number_that_a_client_means_has_few_enough_digits() -> None:
    for number in (0.1 + 0.2, 1 / 3, 5e-324 + 0.7, 1e-7, "0.70"):
        assert ChatRequest.model_validate(CHAT | {"temperature": number}).temperature == Decimal(str(number))
    assert str(ChatRequest.model_validate(CHAT | {"temperature": "0.5" + "0" * 70_000}).temperature) == "0.5"


def test_decimals_keep_what_was_written() -> None:
    assert ChatRequest.model_validate(CHAT | {"temperature": 0.7}).temperature == Decimal("0.7")
    assert ChatRequest.model_validate(CHAT | {"temperature": 0}).temperature == 0


def test_the_newer_name_of_the_token_limit_is_the_same_limit() -> None:
    assert ChatRequest.model_validate(CHAT | {"max_completion_tokens": 9}).token_limit == 9
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 9}).token_limit == 9


def test_log_probabilities_of_both_endpoints_say_how_many_alternatives() -> None:
    chat = ChatRequest.model_validate(CHAT | {"logprobs": True, "top_logprobs": 20})
    assert (chat.wants_logprobs, chat.alternatives) == (True, 20)
    plain = CompletionRequest.model_validate(PLAIN | {"logprobs": 0})
    assert (plain.wants_logprobs, plain.alternatives) == (True, 0)
