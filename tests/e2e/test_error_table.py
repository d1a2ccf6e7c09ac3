"""Every row of the contract's error table, as an application sees it through the official client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.request import EngineDead, EngineOverloaded, RequestRefused
from policies.store import set_suspended, state
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand, database_locked, leaves, part
from tests.support.scripted_engine import ScriptedEngine
from tests.support.sdk import CONTRACT_HEADERS, ask, ask_raw, openai_client, streamed_text
from tests.support.tenant import MODEL, TENANT, activate_policy, policy_text

CARD = "4111 1111 1111 1111"
BLOCKS_CARDS = "  no-cards-in: {detector: pii, stage: input, action: block, entities: [card], on_error: block}\n"
HALTS_ON_CARDS = (
    "  no-cards-out: {detector: pii, stage: output, action: block, entities: [card], on_error: block,"
    " streaming: {mode: window, hold_chars: 96}}\n"
)
TENANTS = {  # what the rule obliges to, and the sections that says it
    "guarded": ("guardrails: [no-cards-in]", f"guardrails:\n{BLOCKS_CARDS}"),
    "halted": ("guardrails: [no-cards-out]", f"guardrails:\n{HALTS_ON_CARDS}"),
    "rated": ("limits: few", "limits:\n  few: {per_subject: {requests_per_minute: 1}}"),
    "narrow": ("limits: few", "limits:\n  few: {per_tenant: {concurrency: 1}}"),
    "spent": ("limits: few", "limits:\n  few: {per_tenant: {tokens_per_day: 8}}"),
    "strict": ("params: small", 'params:\n  small: {temperature: {max: "1"}, on_excess: reject}'),
    "suspended": ("", ""),
}
CONTEXT = 512


class Switchboard:
    """What the model says to a prompt, and a gate that a test may close before an answer."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def reply(self, prompt: str) -> str:
        if "overload" in prompt:
            raise EngineOverloaded("full")
        if "die" in prompt:
            raise EngineDead("gone")
        if "refuse" in prompt:
            raise RequestRefused("`stop` is too odd", "stop")
        if "card" in prompt:
            return f"{'Your card is as follows. ' * 8}{CARD}, as you know."
        return "an answer"

    async def step(self, position: int) -> None:
        if not self.gate.is_set():
            await asyncio.to_thread(self.gate.wait, 30)


@pytest.fixture(scope="module")
def board() -> Switchboard:
    return Switchboard()


@pytest.fixture(scope="module")
def engine(board: Switchboard) -> ScriptedEngine:
    return ScriptedEngine(board.reply, step=board.step, context_length=CONTEXT, chunk=8)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, engine: ScriptedEngine) -> Iterator[RunningGateway]:
    overrides: dict[str, Any] = {"audit__append_timeout_s": 1.5, "server__max_body_bytes": 65_536}
    with running_gateway(tmp_path_factory.mktemp("errors"), engine, **overrides) as running:
        for tenant, (obligations, sections) in TENANTS.items():
            text = policy_text(engine.model.digest, tenant=tenant, obligations=obligations, sections=sections)
            activate_policy(running.app, text)
        suspend(running, "suspended")
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai_client(gateway) as opened:
        yield opened


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def suspend(gateway: RunningGateway, tenant: str) -> None:
    with gateway.rooms.log.database.writer.begin() as connection:
        set_suspended(connection, tenant, True, state(connection, tenant).generation)
    gateway.rooms.policies.invalidate(tenant)


def post(gateway: RunningGateway, body: bytes) -> httpx.Response:
    headers = {"authorization": f"Bearer {gateway.credential()}", "content-type": "application/json"}
    return httpx.post(f"{gateway.url}/v1/chat/completions", content=body, headers=headers, trust_env=False)


def refusal(client: openai.OpenAI, kind: type[openai.APIStatusError], **asked: Any) -> openai.APIStatusError:
    """Return the exception, which is of exactly this class."""
    with pytest.raises(kind) as refused:
        ask(client, **asked)
    assert type(refused.value) is kind
    assert refused.value.response.headers["x-request-id"]
    return refused.value


def assert_denied_on_record(gateway: RunningGateway, error: openai.APIStatusError, tenant: str = TENANT) -> None:
    """The receipt that came with the refusal names its record."""
    headers = error.response.headers
    denied = [leaf for leaf in leaves(gateway, tenant, "request.denied") if leaf.request == headers["x-request-id"]]
    assert len(denied) == 1
    origin, writer, seq, _ = headers["probity-receipt"].split(";")
    assert (origin, writer, seq) == (denied[0].log, denied[0].writer, str(denied[0].writer_seq))
    assert headers["probity-policy"]
    assert headers["probity-model"] == gateway.rooms.engine.model.digest
    assert part(gateway, denied[0], "prompt", tenant)


# --- 401, 403, 404 ---


@pytest.mark.parametrize("credential", ["", "not-a-credential", "a.b.c"])
def test_a_bad_credential_is_an_authentication_error(gateway: RunningGateway, credential: str) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=credential or "-", max_retries=0) as stranger:
        error = refusal(stranger, openai.AuthenticationError)
    assert error.code == "invalid_api_key"
    assert error.status_code == 401


def test_a_role_without_the_permission_is_a_permission_error(gateway: RunningGateway) -> None:
    with openai_client(gateway, "auditor") as auditor:
        assert refusal(auditor, openai.PermissionDeniedError).code == "permission_denied"


def test_a_denial_by_policy_is_a_permission_error_on_record(gateway: RunningGateway, stream: bool) -> None:
    with openai_client(gateway, "app", tenant="nobodys-policy") as client:
        error = refusal(client, openai.PermissionDeniedError, stream=stream)
    assert error.code == "policy_denied"
    assert_denied_on_record(gateway, error, "nobodys-policy")


def test_a_suspended_tenant_is_a_permission_error_on_record(gateway: RunningGateway, stream: bool) -> None:
    with openai_client(gateway, "app", tenant="suspended") as client:
        error = refusal(client, openai.PermissionDeniedError, stream=stream)
    assert error.code == "suspended"
    assert_denied_on_record(gateway, error, "suspended")


@pytest.mark.parametrize("model", ["no-such-model", "x" * 128, "modèle", "a b", "\n"])
def test_an_unknown_model_is_not_found_and_on_record(
    gateway: RunningGateway, client: openai.OpenAI, model: str, stream: bool
) -> None:
    error = refusal(client, openai.NotFoundError, model=model, stream=stream)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert model not in error.response.text or len(model) == 1
    assert_denied_on_record(gateway, error)


# --- 400 ---


def test_an_input_guardrail_is_a_bad_request_on_record(gateway: RunningGateway, stream: bool) -> None:
    with openai_client(gateway, "app", tenant="guarded") as client:
        error = refusal(client, openai.BadRequestError, text=f"charge {CARD}", stream=stream)
    assert error.code == "content_filter"
    assert CARD not in error.response.text
    assert_denied_on_record(gateway, error, "guarded")


def test_a_prompt_longer_than_the_context_is_a_bad_request(
    gateway: RunningGateway, client: openai.OpenAI, stream: bool
) -> None:
    error = refusal(client, openai.BadRequestError, text="x" * CONTEXT, stream=stream)
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert_denied_on_record(gateway, error)


def test_the_output_asked_for_counts_to_the_context(client: openai.OpenAI) -> None:
    assert refusal(client, openai.BadRequestError, max_tokens=CONTEXT).code == "context_length_exceeded"


def test_a_plain_prompt_longer_than_the_context_names_its_own_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="x" * CONTEXT)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_a_parameter_that_the_policy_rejects_is_named(gateway: RunningGateway) -> None:
    with openai_client(gateway, "app", tenant="strict") as client:
        error = refusal(client, openai.BadRequestError, temperature=1.5)
    assert (error.code, error.param) == ("invalid_request", "temperature")
    assert_denied_on_record(gateway, error, "strict")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, None),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"a word": 1}}, "logit_bias"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "Mia"}]}, "messages.0.name"),
        ({"extra_body": {"surprise": True}}, None),
        ({"model": ""}, "model"),
        ({"model": "a\0b"}, "model"),
        ({"stop": [""]}, "stop"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_malformed_request_is_a_bad_request_that_names_the_field(
    engine: ScriptedEngine, client: openai.OpenAI, asked: dict[str, Any], param: str | None
) -> None:
    before = len(engine.prompts)
    error = refusal(client, openai.BadRequestError, **asked)
    assert error.code == "invalid_request"
    assert error.param == param or (error.param or "").startswith(f"{param}.")
    assert len(engine.prompts) == before


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": "m", "model": "m"}', b'{"temperature": NaN}', b"\xff", b"[" * 100_00],
)
def test_a_body_that_is_not_the_json_of_a_request_is_a_bad_request(gateway: RunningGateway, body: bytes) -> None:
    answer = post(gateway, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"


def test_a_prompt_with_half_a_surrogate_is_a_bad_request(gateway: RunningGateway) -> None:
    body = b'{"model": "test-chat", "messages": [{"role": "user", "content": "\\ud800"}]}'
    answer = post(gateway, body)
    assert answer.status_code == 400


def test_what_the_engine_refuses_is_a_bad_request(client: openai.OpenAI, stream: bool) -> None:
    error = refusal(client, openai.BadRequestError, text="refuse", stream=stream)
    assert (error.code, error.param) == ("invalid_request", "stop")


# --- 413, 429 ---


def test_a_body_too_large_is_413(gateway: RunningGateway, client: openai.OpenAI) -> None:
    error = refusal(client, openai.APIStatusError, text="x" * 65_536)
    assert (error.status_code, error.code) == (413, "request_too_large")


def test_a_rate_is_a_rate_limit_error_that_says_when_to_come_back(gateway: RunningGateway, stream: bool) -> None:
    subject = f"rated-{stream}@test.example"
    with openai_client(gateway, "app", tenant="rated", subject=subject) as client:
        ask(client)
        error = refusal(client, openai.RateLimitError, stream=stream)
    assert error.code == "rate_limit_exceeded"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    assert_denied_on_record(gateway, error, "rated")


def test_concurrency_is_given_back_when_an_answer_ends(gateway: RunningGateway, board: Switchboard) -> None:
    with openai_client(gateway, "app", tenant="narrow") as client:
        board.gate.clear()
        try:
            held = threading.Thread(target=ask, args=(client,))
            held.start()
            while gateway.rooms.pipeline.governed == 0:
                board.gate.wait(0.005)
            error = refusal(client, openai.RateLimitError)
        finally:
            board.gate.set()
            held.join()
        assert error.code == "rate_limit_exceeded"
        assert ask(client).choices[0].message.content == "an answer"


def test_a_spent_budget_is_a_rate_limit_error_that_is_not_worth_trying_again(
    gateway: RunningGateway, stream: bool
) -> None:
    with openai_client(gateway, "app", tenant="spent") as client:
        error = refusal(client, openai.RateLimitError, stream=stream)
    assert error.code == "insufficient_quota"
    assert error.response.headers["x-should-retry"] == "false"
    assert_denied_on_record(gateway, error, "spent")


# --- 503 ---


def test_a_log_that_cannot_confirm_is_unavailable(
    gateway: RunningGateway, engine: ScriptedEngine, client: openai.OpenAI, stream: bool
) -> None:
    before = len(engine.prompts)
    with database_locked(gateway):
        error = refusal(client, openai.InternalServerError, stream=stream)
        denial = refusal(client, openai.InternalServerError, model="no-such-model", stream=stream)
    for refused in (error, denial):
        assert (refused.status_code, refused.code) == (503, "audit_unavailable")
        assert int(refused.response.headers["retry-after"]) >= 1
    assert len(engine.prompts) == before


@pytest.mark.parametrize(("text", "code"), [("overload", "overloaded"), ("die", "engine_unavailable")])
def test_an_engine_that_cannot_is_unavailable(client: openai.OpenAI, text: str, code: str, stream: bool) -> None:
    error = refusal(client, openai.InternalServerError, text=text, stream=stream)
    assert (error.status_code, error.code) == (503, code)
    assert int(error.response.headers["retry-after"]) >= 1
    assert error.response.headers["probity-receipt"]  # it was received, and is on record


def test_one_tenant_does_not_take_every_place(tmp_path: Path) -> None:
    board = Switchboard()
    engine = ScriptedEngine(board.reply, step=board.step)
    with running_gateway(tmp_path, engine, limits__max_governed=4) as gateway:
        activate_policy(gateway.app, policy_text(gateway.rooms.engine.model.digest, tenant="other"))
        board.gate.clear()
        with openai_client(gateway, "app") as client, openai_client(gateway, "app", tenant="other") as other:
            threads = [threading.Thread(target=ask, args=(client,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            while gateway.rooms.pipeline.governed < 3:
                board.gate.wait(0.005)
            assert refusal(client, openai.InternalServerError).code == "overloaded"
            board.gate.set()
            assert ask(other).choices[0].message.content == "an answer"
            for thread in threads:
                thread.join()
            assert ask(client).choices[0].message.content == "an answer"  # its places are free again
        assert not gateway.rooms.pipeline._of_tenant


def test_more_than_the_process_governs_is_overloaded(tmp_path: Path) -> None:
    board = Switchboard()
    board.gate.clear()
    with (
        running_gateway(tmp_path, ScriptedEngine(board.reply, step=board.step), limits__max_governed=1) as gateway,
        openai_client(gateway) as client,
    ):
        held = threading.Thread(target=ask, args=(client,))
        held.start()
        while gateway.rooms.pipeline.governed == 0:
            board.gate.wait(0.005)
        assert refusal(client, openai.InternalServerError).code == "overloaded"
        board.gate.set()
        held.join()
        assert ask(client).choices[0].message.content == "an answer"


def test_a_burst_that_waits_for_the_log_counts_as_governed(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with running_gateway(tmp_path, engine, limits__max_governed=2, audit__append_timeout_s=20) as gateway:
        headers = {"authorization": f"Bearer {gateway.credential()}"}
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}

        def status() -> int:
            answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=asked, headers=headers, timeout=30)
            return answer.status_code

        with ThreadPoolExecutor(6) as pool:
            with database_locked(gateway):
                answers = [pool.submit(status) for _ in range(6)]
                refused = [done.result() for _, done in zip(range(4), as_completed(answers), strict=False)]
            assert refused == [503] * 4
            assert sorted(answer.result() for answer in answers) == [200, 200, 503, 503, 503, 503]
    assert len(engine.prompts) == 2


def test_a_draining_gateway_takes_nothing_new_and_ends_what_it_has(tmp_path: Path, stream: bool) -> None:
    board = Switchboard()
    board.gate.clear()
    answers: list[str] = []
    with (
        running_gateway(tmp_path, ScriptedEngine(board.reply, step=board.step)) as gateway,
        openai_client(gateway) as client,
    ):
        held = threading.Thread(target=lambda: answers.append(ask(client).choices[0].message.content))
        held.start()
        while gateway.rooms.pipeline.governed == 0:
            board.gate.wait(0.005)
        gateway.rooms.pipeline.stop_taking()
        error = refusal(client, openai.InternalServerError, stream=stream)
        assert (error.status_code, error.code) == (503, "draining")
        board.gate.set()
        held.join()
    assert answers == ["an answer"]


# --- while streaming ---


def test_an_output_guardrail_ends_a_stream_with_content_filter_usage_and_done(gateway: RunningGateway) -> None:
    with openai_client(gateway, "app", tenant="halted") as client:
        chunks = list(ask(client, "my card, please", stream=True, stream_options={"include_usage": True}))
        last, usage = chunks[-2:]
        assert last.choices[0].finish_reason == "content_filter"
        assert usage.choices == []
        assert usage.usage.completion_tokens > 0
        assert "4111" not in streamed_text(chunks)
        assert streamed_text(chunks).startswith("Your card is as follows.")
        with client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=[{"role": "user", "content": "my card, please"}], stream=True
        ) as response:
            assert all(response.headers.get(name) for name in CONTRACT_HEADERS)
            assert response.read().endswith(b"data: [DONE]\n\n")


def test_an_output_guardrail_halts_a_whole_answer_too(gateway: RunningGateway) -> None:
    with openai_client(gateway, "app", tenant="halted") as client:
        response = ask_raw(client, "my card, please")
    choice = response.parse().choices[0]
    assert choice.finish_reason == "content_filter"
    assert "4111" not in response.text
    completed = [
        leaf
        for leaf in leaves(gateway, "halted", "request.completed")
        if leaf.request == response.headers["x-request-id"]
    ]
    assert completed[0].body["guardrails"][0]["verdict"] == "blocked"


def test_log_probabilities_are_refused_where_a_guardrail_withholds_output(gateway: RunningGateway) -> None:
    with openai_client(gateway, "app", tenant="halted") as client:
        error = refusal(client, openai.BadRequestError, logprobs=True)
    assert (error.code, error.param) == ("invalid_request", "logprobs")


@pytest.mark.parametrize("alternatives", [0, 20])
def test_those_of_a_prompt_would_show_what_the_model_says_next_and_are_refused_too(
    gateway: RunningGateway, engine: ScriptedEngine, alternatives: int
) -> None:
    asked = len(engine.prompts)
    with openai_client(gateway, "app", tenant="halted") as client:
        error = refusal(client, openai.BadRequestError, extra_body={"prompt_logprobs": alternatives})
    assert (error.code, error.param) == ("invalid_request", "prompt_logprobs")
    assert len(engine.prompts) == asked


# --- the shape ---


def test_every_error_has_the_four_fields_and_never_repeats_what_was_sent(gateway: RunningGateway) -> None:
    hand = Hand(gateway, "app")
    canary = "canary-7c9e"
    bodies: list[Any] = [
        {"model": canary, "messages": [{"role": "user", "content": canary}]},
        {"model": MODEL, "messages": canary},
        {"model": MODEL, "messages": [{"role": canary, "content": canary}]},
        {canary: canary},
        canary,
    ]
    answers = [hand.post("/v1/chat/completions", body) for body in bodies]
    answers.append(hand.get(f"/v1/models/{canary}"))
    answers.append(hand.get(f"/{canary}"))
    answers.append(httpx.get(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {canary}"}))
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert canary not in answer.text
        assert canary not in str(answer.headers)
