"""Vectors through the official client: governed and on record like an answer, and made again bit for bit."""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from tests.support.engine_core import make_core
from tests.support.engine_runtime import make_runtime
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand
from tests.support.paged_runner import PagedRunner
from tests.support.tenant import MODEL

TEXTS = ["What does a card cost?", "Was kostet ein Konto?", "x" * 300]
CANARY = "a-canary-in-the-input"
SECTIONS = (
    "guardrails:\n  cards: {detector: pii, stage: input, action: redact, entities: [card], on_error: block}\n"
    "  mail: {detector: pii, stage: input, action: block, entities: [email], on_error: block}"
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    core = make_core(runner=PagedRunner(2048, 258), clock=time.monotonic, vocabulary_size=258, context_length=512)
    obligations = "guardrails: [cards, mail]"
    data = tmp_path_factory.mktemp("embeddings")
    with running_gateway(data, make_runtime(core), obligations=obligations, sections=SECTIONS) as running:
        yield running


def test_a_vector_for_each_text_of_length_one_and_the_same_alone_as_among_others(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model=MODEL, input=TEXTS)
    assert [entry.index for entry in whole.data] == [0, 1, 2]
    assert whole.usage.prompt_tokens == whole.usage.total_tokens == sum(len(text) + 1 for text in TEXTS)
    for text, entry in zip(TEXTS, whole.data, strict=True):
        assert math.isclose(sum(x * x for x in entry.embedding), 1, rel_tol=1e-6)
        assert client.embeddings.create(model=MODEL, input=text).data[0].embedding == entry.embedding
    mean = client.embeddings.create(model=MODEL, input=TEXTS, extra_body={"pooling": "mean"})
    assert mean.data[0].embedding != whole.data[0].embedding


def test_decimals_and_base64_are_the_same_bits(client: openai.OpenAI) -> None:
    written = client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float").data[0].embedding
    encoded: Any = client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="base64").data[0].embedding
    assert struct.pack(f"<{len(written)}f", *written) == base64.b64decode(encoded)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_on_record_before_they_leave_and_replay_identically(
    client: openai.OpenAI, auditor: Hand, pooling: str
) -> None:
    card = "4111 1111 1111 1111"
    asked: dict[str, Any] = {"input": [f"My card is {card}.", TEXTS[1]], "extra_body": {"pooling": pooling}}
    response = client.embeddings.with_raw_response.create(model=MODEL, encoding_format="base64", **asked)
    request_id = response.headers["x-request-id"]
    story = auditor.get(f"/audit/requests/{request_id}").raise_for_status().json()
    assert story["status"] == "completed"
    assert story["sampling"] == {"adjusted": [], "inputs": 2, "pooling": pooling}
    assert [guardrail["verdict"] for guardrail in story["guardrails"]] == ["redacted", "passed"]
    revealed = auditor.post(f"/audit/requests/{request_id}:reveal", {"reason": "test"}).raise_for_status().json()
    assert revealed["output"] == [entry.embedding for entry in response.parse().data]
    assert json.loads(revealed["prompt_to_model"]) == ["My card is [CARD].", TEXTS[1]]
    for mode in ("regenerate", "forced"):
        outcome = auditor.post(f"/audit/requests/{request_id}:replay", {"mode": mode}).raise_for_status().json()
        assert (outcome["outcome"], len(outcome["choices"])) == ("identical", 2)


@pytest.mark.parametrize(
    ("asked", "code", "param", "named"),
    [
        ({"input": [1, 2, 3]}, "invalid_request", "input", "send texts"),
        ({"input": [[1], [2]]}, "invalid_request", "input", "send texts"),
        ({"input": []}, "invalid_request", "input", "at least 1"),
        ({"input": ["a", ""]}, "invalid_request", "input", "at least 1"),
        ({"input": ["a"] * 129}, "invalid_request", "input", "at most 128"),
        ({"input": "a", "dimensions": 3}, "invalid_request", "dimensions", "not supported"),
        ({"input": "a", "extra_body": {"pooling": CANARY}}, "invalid_request", "pooling", ""),
        ({"input": ["fine", f"{CANARY} " * 30]}, "context_length_exceeded", "input", "512"),
        ({"input": ["fine", f"{CANARY}@example.com"]}, "content_filter", None, ""),
    ],
)
def test_what_cannot_be_made_a_vector_is_refused_by_name_and_not_repeated(
    client: openai.OpenAI, asked: dict[str, Any], code: str, param: str | None, named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=MODEL, **asked)
    assert (refused.value.code, (refused.value.param or "").split(".")[0]) == (code, param or "")
    assert named in refused.value.message
    assert CANARY not in refused.value.message


def test_langchain_embeds_documents_and_questions(gateway: RunningGateway, client: openai.OpenAI) -> None:
    key: Any = gateway.credential("app")
    embeddings = OpenAIEmbeddings(
        base_url=f"{gateway.url}/v1", api_key=key, model=MODEL, check_embedding_ctx_length=False, max_retries=0
    )
    vectors = embeddings.embed_documents(TEXTS)
    assert vectors[0] == embeddings.embed_query(TEXTS[0])
    assert vectors[1] == client.embeddings.create(model=MODEL, input=TEXTS[1]).data[0].embedding
