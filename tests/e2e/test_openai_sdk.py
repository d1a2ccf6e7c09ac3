"""The official `openai` client over real HTTP: it works unchanged.

The engine is the real one (paged cache, scheduler, runtime thread); only its arithmetic is the hashes of `PagedRunner`,
which depend on every token before, on the seed and on the position, as a model's would. Its answers are ASCII, control
characters included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from audit.checkpoint import open_checkpoint
from audit.merkle import check_inclusion
from audit.trust import read_trust
from tests.support.engine_core import make_core
from tests.support.engine_runtime import make_runtime
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.paged_runner import PagedRunner
from tests.support.sdk import CONTRACT_HEADERS, ask, ask_raw, openai_client, streamed_text
from tests.support.tenant import MODEL

ASCII = 128  # tokens of the vocabulary
QUESTION = "When is the cut-off time for transfers?"
SHORT = {"max_tokens": 24}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    engine = make_runtime(make_core(runner=PagedRunner(1024, ASCII), clock=time.monotonic))
    with running_gateway(tmp_path_factory.mktemp("sdk"), engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai_client(gateway, "app", purpose="testing") as opened:
        yield opened


@pytest.fixture(scope="module")
def auditor(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "auditor", subject="otto@test.example")


def revealed(auditor: Hand, request_id: str) -> Any:
    return auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "the sdk test"}).raise_for_status().json()


def story(auditor: Hand, request_id: str) -> Any:
    return auditor.get(f"/audit/requests/{request_id}").raise_for_status().json()


def test_an_answer_carries_the_headers_of_the_contract_and_is_on_record_as_it_was_sent(
    client: openai.OpenAI, auditor: Hand
) -> None:
    response = ask_raw(client, QUESTION, **SHORT)
    answer = response.parse()
    assert all(response.headers.get(name) for name in CONTRACT_HEADERS)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == MODEL
    request_id = response.headers["x-request-id"]
    told = story(auditor, request_id)
    assert told["status"] == "completed"
    assert told["model"]["engine"] == answer.system_fingerprint
    assert told["model"]["version"] == response.headers["probity-model"]
    assert told["decision"]["policy"] == response.headers["probity-policy"]
    assert told["usage"]["completion_tokens"] == answer.usage.completion_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert revealed(auditor, request_id)["output"] == [answer.choices[0].message.content]
    # The receipt names the record that holds the output.
    closing = told["records"][-1]
    assert response.headers["probity-receipt"].split(";")[2:] == [str(closing["writer_seq"]), closing["leaf_hash"]]


def test_a_streamed_answer_is_the_one_that_is_not_streamed(client: openai.OpenAI) -> None:
    fixed: dict[str, Any] = {"seed": 7, "temperature": 0.8, **SHORT}
    whole = ask(client, QUESTION, **fixed)
    chunks = list(ask(client, QUESTION, stream=True, stream_options={"include_usage": True}, **fixed))
    assert streamed_text(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_without_include_usage_sends_none(client: openai.OpenAI) -> None:
    assert all(chunk.usage is None for chunk in ask(client, QUESTION, stream=True, **SHORT))


def test_a_streamed_answer_carries_the_headers_of_the_contract(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], stream=True, max_tokens=4
    ) as response:
        assert all(response.headers.get(name) for name in CONTRACT_HEADERS)
        body = response.read()
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_are_answered_apart_and_repeat_with_their_seed(
    client: openai.OpenAI, auditor: Hand, stream: bool
) -> None:
    fixed: dict[str, Any] = {"n": 2, "seed": 11, "temperature": 1.5, **SHORT}
    first = ask(client, QUESTION, **fixed)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts[0] != texts[1]
    if stream:
        response = ask_raw(client, QUESTION, stream=True, **fixed)
        chunks = list(response.parse())
        assert [streamed_text(chunks, index) for index in (0, 1)] == texts
    else:
        response = ask_raw(client, QUESTION, **fixed)
        assert [choice.message.content for choice in response.parse().choices] == texts
    assert revealed(auditor, response.headers["x-request-id"])["output"] == texts


def test_the_same_seed_gives_the_same_answer_and_another_gives_another(client: openai.OpenAI) -> None:
    answers = [
        ask(client, QUESTION, seed=seed, temperature=1.5, **SHORT).choices[0].message.content for seed in (3, 3, 4)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_seed_that_the_server_drew_is_on_record_and_repeats_the_answer(client: openai.OpenAI, auditor: Hand) -> None:
    response = ask_raw(client, QUESTION, temperature=1.5, **SHORT)
    text = response.parse().choices[0].message.content
    seed = int(story(auditor, response.headers["x-request-id"])["sampling"]["seed"])
    assert ask(client, QUESTION, temperature=1.5, seed=seed, **SHORT).choices[0].message.content == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client: openai.OpenAI, stream: bool) -> None:
    fixed: dict[str, Any] = {"temperature": 0, "seed": 5, **SHORT}
    whole = ask(client, QUESTION, **fixed).choices[0].message.content
    stop = whole[4:7]
    stopped = ask(client, QUESTION, stop=[stop], stream=stream, **fixed)
    text = streamed_text(stopped) if stream else stopped.choices[0].message.content
    assert text == whole[: whole.index(stop)]


def test_logprobs_are_those_of_the_tokens_sent_and_the_best_come_first(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTION, seed=5, logprobs=True, top_logprobs=3, **SHORT)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().startswith(answer.choices[0].message.content)
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        ranked = [top.logprob for top in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert entry.top_logprobs[0].token == entry.token
        assert 0 < math.exp(entry.logprob) <= 1
    streamed = list(ask(client, QUESTION, seed=5, logprobs=True, top_logprobs=3, stream=True, **SHORT))
    of_chunks = [
        entry
        for chunk in streamed
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or ()
    ]
    assert [(e.token, e.logprob) for e in of_chunks] == [(e.token, e.logprob) for e in entries]


def test_plain_completions_streamed_and_not(client: openai.OpenAI, auditor: Hand) -> None:
    fixed: dict[str, Any] = {"model": MODEL, "prompt": "The fee is", "max_tokens": 12, "seed": 5, "logprobs": 1}
    whole = client.completions.create(**fixed)
    assert whole.object == "text_completion"
    lists = whole.choices[0].logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == 12
    chunks = list(client.completions.create(**fixed, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    offsets = [at for chunk in chunks for c in chunk.choices if c.logprobs for at in c.logprobs.text_offset]
    assert offsets == lists.text_offset
    assert revealed(auditor, whole.id.removeprefix("cmpl-"))["output"] == [whole.choices[0].text]


def test_what_bends_the_choice_of_tokens_is_honoured_on_record_and_replayed(
    client: openai.OpenAI, auditor: Hand
) -> None:
    bent: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {"65": 5, "66": -100}}
    more = {"repetition_penalty": 1.1, "stop_token_ids": [90], "min_tokens": 24, "allowed_token_ids": [65, 67, 90]}
    plain = ask_raw(client, QUESTION, seed=3, **SHORT).parse()
    response = ask_raw(client, QUESTION, seed=3, **SHORT, **bent, extra_body=more)
    answer = response.parse()
    assert answer.choices[0].message.content != plain.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24  # the stop token may not come before
    request_id = response.headers["x-request-id"]
    sampling = story(auditor, request_id)["sampling"]
    assert sampling["presence_penalty"] == "0.5"
    assert (sampling["logit_bias_count"], sampling["min_tokens"]) == (2, 24)
    for mode in ("regenerate", "forced"):
        replayed = auditor.post(f"/audit/requests/{request_id}:replay", {"mode": mode}).raise_for_status().json()
        assert (replayed["mode"], replayed["outcome"]) == (mode, "identical")


def test_log_probabilities_of_the_prompt_are_of_its_own_tokens(client: openai.OpenAI, auditor: Hand) -> None:
    asked: dict[str, Any] = {"seed": 5, "extra_body": {"prompt_logprobs": 2}, "n": 2, **SHORT}
    response = ask_raw(client, QUESTION, **asked)
    answer = response.parse()
    (first, *others) = answer.prompt_logprobs
    assert first is None
    assert len(others) == answer.usage.prompt_tokens - 1
    spelt = "".join(list(entry.values())[-1]["decoded_token"] for entry in others)
    assert QUESTION in spelt
    for entry in others:
        ranked = [one["logprob"] for one in list(entry.values())[:2]]
        assert ranked == sorted(ranked, reverse=True)
    assert ask(client, QUESTION, **asked).prompt_logprobs == answer.prompt_logprobs  # not taken from the cache
    assert story(auditor, response.headers["x-request-id"])["sampling"]["prompt_logprobs"] == 2
    plain = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert all(len(entry) == 1 for entry in plain.choices[0].prompt_logprobs[1:])  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="`stream`"):
        ask(client, QUESTION, stream=True, extra_body={"prompt_logprobs": 1})


def test_a_token_that_the_model_does_not_have_is_refused_by_the_field_s_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, QUESTION, **SHORT, logit_bias={"999999": 1})
    assert (refused.value.code, refused.value.param) == ("invalid_request", "logit_bias")


def test_models_are_listed_and_found_by_the_alias_of_the_policy(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "probity"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("no-such-model")
    assert refused.value.code == "model_not_found"


def test_an_application_checks_the_proof_of_its_own_receipt(client: openai.OpenAI, gateway: RunningGateway) -> None:
    response = ask_raw(client, QUESTION, max_tokens=2)
    request_id = response.headers["x-request-id"]
    app = Hand(gateway, "app")
    for _ in range(200):  # signed within a second
        records = app.get(f"/v1/receipts/{request_id}").raise_for_status().json()["records"]
        if all(record["inclusion"] for record in records):
            break
        time.sleep(0.05)
    assert [record["type"] for record in records] == ["request.received", "request.completed"]
    assert records[-1]["receipt"] == response.headers["probity-receipt"]
    trust = read_trust(gateway.rooms.settings.data_dir / "trust")
    for record in records:
        inclusion = record["inclusion"]
        origin = record["receipt"].split(";")[0]
        signed = open_checkpoint(inclusion["checkpoint"], origin, trust.logs[origin])
        assert signed.size == inclusion["tree_size"]
        hashes = [bytes.fromhex(value) for value in inclusion["hashes"]]
        check_inclusion(bytes.fromhex(record["leaf_hash"]), record["leaf_index"], signed.size, hashes, signed.root)
    assert Hand(gateway, "app", subject="noah@test.example").get(f"/v1/receipts/{request_id}").status_code == 404
