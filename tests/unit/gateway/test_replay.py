"""Replay: what is made again from the evidence, when it is refused, and what is called what."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from audit.canonical import canonical
from audit.leaf import Leaf
from audit.reader import RevealedContent
from audit.records import RecordType
from engine.request import choice_seed
from gateway.replay import ReplayRefused, recording, replay
from tests.support.scripted_engine import ScriptedEngine

REQUEST = "0193f0c2-0000-7000-8000-000000000001"
ANSWER = "the answer"
BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "hello"}],
    "n": 2,
    "stop": ["END", "\n"],
    "temperature": 0.7,
    "seed": 5,
}


class OtherMachine(ScriptedEngine):
    """The same model under another numeric policy."""

    @property
    def numeric_policy(self) -> str:
        return "sha256:" + "0" * 64


def leaf(type: RecordType, body: dict[str, Any]) -> Leaf:
    """Return a leaf as it is read back from the log."""
    written = Leaf(
        log="probity.test/acme",
        writer="0" * 16,
        writer_seq=0,
        prev="0" * 64,
        record=REQUEST,
        type=type,
        time="2026-11-20T19:43:00.123456Z",
        nonce="0" * 32,
        body=body,
        request=REQUEST,
    )
    return Leaf.parse(written.encode())


def received(engine: ScriptedEngine, **changes: Any) -> Leaf:
    sampling = {
        "max_tokens": 64,
        "temperature": "0.7",
        "top_p": "0.95",
        "top_k": 40,
        "min_p": "0.05",
        "seed": "5",
        "n": 2,
        "stop_count": 2,
        "ignore_eos": False,
        "logprobs": False,
        "top_logprobs": 0,
        "adjusted": [],
    }
    body = {
        "action": "chat.completions",
        "model": {"alias": "m", "version": engine.model.digest, "engine": engine.numeric_policy},
        "sampling": sampling,
    }
    return leaf(RecordType.REQUEST_RECEIVED, body | changes)


async def completed(engine: ScriptedEngine, **changes: Any) -> Leaf:
    """Return the closing leaf of an answer of two choices, with digests as the engine gives them."""
    recorded = recording([received(engine), _closing(["x", "x"])], content())
    digests = [(await _stats_of(engine, recorded, index)) for index in range(2)]
    return _closing(digests, **changes)


async def _stats_of(engine: ScriptedEngine, recorded: Any, index: int) -> str:
    from engine.request import GenerationRequest

    request = GenerationRequest(f"original/{index}", (1,), recorded.sampling, b"salt", "tenant")
    digest = ""
    async for delta in engine.generate(request):
        if delta.stats is not None:
            digest = delta.stats.replay_digest
    return digest


def _closing(digests: list[str], **changes: Any) -> Leaf:
    choices = [
        {
            "index": index,
            "finish_reason": "stop",
            "tokens": len(ANSWER),
            "seed": str(choice_seed(5, index)),
            "replay": digest,
        }
        for index, digest in enumerate(digests)
    ]
    return leaf(RecordType.REQUEST_COMPLETED, {"status": "completed", "choices": choices} | changes)


def content(tokens: Any = None, **changes: Any) -> RevealedContent:
    generated = [list(ANSWER.encode())] * 2 if tokens is None else tokens
    whole: dict[str, Any] = {
        "prompt": json.dumps(BODY).encode(),
        "prompt_to_model": b"<user>hello\n<assistant>",
        "output": canonical([ANSWER, ANSWER]),
        "output_tokens": json.dumps(generated).encode(),
        "identities": {},
    }
    return RevealedContent(**(whole | changes))


async def test_an_answer_is_made_again_from_its_evidence_alone() -> None:
    engine = ScriptedEngine(lambda prompt: ANSWER)
    closing = await completed(engine)
    recorded = recording([received(engine), closing], content())
    assert recorded.sampling.stop == ("END", "\n")
    assert (recorded.sampling.temperature, recorded.sampling.top_p, recorded.sampling.min_p) == (0.7, 0.95, 0.05)
    assert (recorded.sampling.top_k, recorded.sampling.seed) == (40, 5)
    engine.prompts.clear()
    outcome = await replay(engine, recorded, "replay")
    assert outcome.outcome == "identical"
    assert [choice.first_difference for choice in outcome.choices] == [None, None]
    assert engine.prompts == ["<user>hello\n<assistant>"] * 2


def test_what_bent_the_choice_of_tokens_is_read_from_the_leaf_and_the_body() -> None:
    engine = ScriptedEngine()
    asked = {"logit_bias": {"9": 1.5, "2": -7}, "stop_token_ids": [4], "allowed_token_ids": [8, 7]}
    stated = {"presence_penalty": "-0.5", "frequency_penalty": "1.25", "repetition_penalty": "1.1", "min_tokens": 3}
    plain = received(engine)
    body: Any = plain.body
    opening = received(engine, sampling=body["sampling"] | stated)
    sent = content(prompt=json.dumps(BODY | asked).encode())
    sampling = recording([opening, _closing(["x", "x"])], sent).sampling
    assert sampling.logit_bias == ((2, -7.0), (9, 1.5))
    assert (sampling.stop_tokens, sampling.allowed_tokens, sampling.min_tokens) == ((4,), (7, 8), 3)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert penalties == (-0.5, 1.25, 1.1)
    # A leaf of the time before there were any asks for none.
    before = recording([plain, _closing(["x", "x"])], content()).sampling
    assert not before.looks_back
    assert before.min_tokens == 0


async def test_one_choice_that_differs_makes_the_whole_different_at_its_position() -> None:
    engine = ScriptedEngine(lambda prompt: ANSWER)
    forged = [list(ANSWER.encode()), list(b"the amswer")]
    outcome = await replay(engine, recording([received(engine), await completed(engine)], content(forged)), "replay")
    assert [choice.outcome for choice in outcome.choices] == ["identical", "different"]
    assert (outcome.outcome, outcome.first_difference) == ("different", ANSWER.index("n"))


async def test_equal_tokens_with_another_digest_are_different() -> None:
    engine = ScriptedEngine(lambda prompt: ANSWER)
    outcome = await replay(engine, recording([received(engine), _closing(["00", "00"])], content()), "replay")
    assert (outcome.outcome, outcome.first_difference) == ("different", None)


async def test_equal_tokens_on_another_machine_are_consistent_and_never_identical() -> None:
    original = ScriptedEngine(lambda prompt: ANSWER)
    recorded = recording([received(original), await completed(original)], content())
    outcome = await replay(OtherMachine(lambda prompt: ANSWER), recorded, "replay")
    assert outcome.outcome == "consistent"
    assert outcome.recorded_engine != outcome.engine
    outcome = await replay(OtherMachine(lambda prompt: "the amswer"), recorded, "replay")
    assert outcome.outcome == "different"


async def test_another_model_version_is_refused_by_name_and_asked_nothing() -> None:
    engine = ScriptedEngine(lambda prompt: ANSWER)
    recorded = replace(recording([received(engine), await completed(engine)], content()), version="sha256:other")
    engine.prompts.clear()
    with pytest.raises(ReplayRefused, match="sha256:other"):
        await replay(engine, recorded, "replay")
    assert engine.prompts == []


async def test_a_choice_that_was_cut_off_without_a_digest_is_refused() -> None:
    engine = ScriptedEngine(lambda prompt: ANSWER)
    with pytest.raises(ReplayRefused, match="without a digest"):
        await replay(engine, recording([received(engine), _closing(["", ""])], content()), "replay")


def test_what_has_no_completed_answer_is_refused() -> None:
    engine = ScriptedEngine()
    denied = leaf(RecordType.REQUEST_DENIED, {"code": "policy_denied"})
    interrupted = leaf(RecordType.REQUEST_INTERRUPTED, {"reason": "writer_ended"})
    with pytest.raises(ReplayRefused, match="denied"):
        recording([denied], content())
    for leaves in ([received(engine)], [received(engine), interrupted]):
        with pytest.raises(ReplayRefused, match="no completed answer"):
            recording(leaves, content())
    with pytest.raises(ReplayRefused, match="content"):
        recording([received(engine), _closing(["", ""])], content(prompt_to_model=None))


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": "m"}', b'{"model": "m", "messages": [], "surprise": 1}'])
def test_a_body_of_a_form_that_is_not_read_any_more_is_refused(body: bytes) -> None:
    engine = ScriptedEngine()
    with pytest.raises(ReplayRefused, match="form"):
        recording([received(engine), _closing(["", ""])], content(prompt=body))
