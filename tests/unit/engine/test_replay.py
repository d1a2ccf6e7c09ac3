from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from engine.replay import ReplayDigest, ReplayInterrupted, ReplayOutcome, force, regenerate
from engine.request import GenerationRequest, RequestRefused, Rest, TokenDelta, no_rest
from engine.runtime import EngineRuntime
from engine.scheduler import LOOKED_AT_CHUNK
from tests.support.engine_core import Output, make_core, make_prompt, make_request, take
from tests.support.engine_runtime import POLICY, make_runtime


@pytest.fixture
def engine() -> Iterator[EngineRuntime]:
    runtime = make_runtime(make_core())
    yield runtime
    runtime.close()


REQUEST = make_request("recorded", make_prompt(50), 20, seed=5)
AGAIN = replace(REQUEST, request_id="again")


async def record(engine: EngineRuntime, request: GenerationRequest = REQUEST) -> Output:
    output = Output()
    async for delta in engine.generate(request):
        take(output, delta)
    return output


def digest_of(output: Output) -> str:
    assert output.stats is not None
    return output.stats.replay_digest


def test_the_example_digest_of_the_format_is_the_documented_one() -> None:
    digest = ReplayDigest()
    digest.update(7, -0.5)
    digest.update(300, 0.0)
    entries = bytes.fromhex("07000000000000bf2c01000000000000")
    assert digest.hexdigest() == hashlib.sha256(entries).hexdigest()
    assert digest.hexdigest() == "5822f26e8ad76645ae25c95fab3a66990deb225e1651b6906fcacf61a01f82fe"


@pytest.mark.parametrize("logprob", [-0.0, float("-inf"), 1.401298464324817e-45, -3.4028234663852886e38])
def test_every_bit_of_the_logprob_counts(logprob: float) -> None:
    digest = ReplayDigest()
    digest.update(2**32 - 1, logprob)
    assert digest.hexdigest() == hashlib.sha256(b"\xff" * 4 + struct.pack("<f", logprob)).hexdigest()


async def test_the_digest_of_a_run_is_the_digest_of_its_tokens_and_logprobs(engine: EngineRuntime) -> None:
    output = await record(engine)
    digest = ReplayDigest()
    for entry in output.logprobs:
        digest.update(entry.token, entry.logprob)
    assert digest_of(output) == digest.hexdigest()


async def test_a_replay_repeats_the_recording_without_touching_what_it_left_in_the_cache(engine: EngineRuntime) -> None:
    recorded = await record(engine)
    hits = engine.metrics().prefix_cache_hits
    verdict = await regenerate(engine, AGAIN, digest_of(recorded), recorded_policy=POLICY)
    assert verdict.outcome is ReplayOutcome.IDENTICAL
    assert (verdict.first_difference, verdict.output_tokens, verdict.digest) == (None, 20, digest_of(recorded))
    assert engine.metrics().prefix_cache_hits == hits


async def test_another_seed_is_different_at_a_named_position(engine: EngineRuntime) -> None:
    recorded = await record(engine)
    tampered = replace(AGAIN, sampling=replace(AGAIN.sampling, seed=6))
    unknown = await regenerate(engine, tampered, digest_of(recorded), recorded_policy=POLICY)
    assert (unknown.outcome, unknown.first_difference) == (ReplayOutcome.DIFFERENT, None)
    known = await regenerate(
        engine, tampered, digest_of(recorded), recorded_policy=POLICY, recorded_tokens=recorded.tokens
    )
    assert (known.outcome, known.first_difference) == (ReplayOutcome.DIFFERENT, 0)


@pytest.mark.parametrize("position", [0, 7, 19])
async def test_one_changed_token_is_found_where_it_is(engine: EngineRuntime, position: int) -> None:
    recorded = await record(engine)
    tokens = list(recorded.tokens)
    tokens[position] ^= 1
    verdict = await regenerate(engine, AGAIN, digest_of(recorded), recorded_policy=POLICY, recorded_tokens=tokens)
    assert (verdict.outcome, verdict.first_difference) == (ReplayOutcome.DIFFERENT, position)


async def test_a_token_claimed_beyond_the_end_is_found(engine: EngineRuntime) -> None:
    recorded = await record(engine)
    tokens = [*recorded.tokens, 3]
    verdict = await regenerate(engine, AGAIN, digest_of(recorded), recorded_policy=POLICY, recorded_tokens=tokens)
    assert (verdict.outcome, verdict.first_difference) == (ReplayOutcome.DIFFERENT, 20)


async def test_equal_tokens_with_another_logprob_are_different_at_no_known_position(engine: EngineRuntime) -> None:
    recorded = await record(engine)
    verdict = await regenerate(engine, AGAIN, "0" * 64, recorded_policy=POLICY, recorded_tokens=recorded.tokens)
    assert (verdict.outcome, verdict.first_difference) == (ReplayOutcome.DIFFERENT, None)


@pytest.mark.parametrize("length", [0, 1, 7])
async def test_an_output_cut_short_is_compared_as_far_as_it_went(engine: EngineRuntime, length: int) -> None:
    recorded = await record(engine)
    digest = ReplayDigest()
    for entry in recorded.logprobs[:length]:
        digest.update(entry.token, entry.logprob)
    tokens = recorded.tokens[:length]
    verdict = await regenerate(engine, AGAIN, digest.hexdigest(), recorded_policy=POLICY, recorded_tokens=tokens)
    assert (verdict.outcome, verdict.output_tokens) == (ReplayOutcome.IDENTICAL, length)


async def test_under_another_numeric_policy_equality_is_never_claimed(engine: EngineRuntime) -> None:
    recorded = await record(engine)
    for tokens, outcome in (
        (recorded.tokens, ReplayOutcome.CONSISTENT),
        (recorded.tokens[::-1], ReplayOutcome.DIFFERENT),
        (None, ReplayOutcome.DIFFERENT),
    ):
        verdict = await regenerate(
            engine, AGAIN, digest_of(recorded), recorded_policy="sha256:other", recorded_tokens=tokens
        )
        assert verdict.outcome is outcome


async def test_a_replay_that_is_aborted_gives_no_verdict() -> None:
    class AbortingRuntime(EngineRuntime):
        async def generate(
            self, request: GenerationRequest, rest_s: Rest = no_rest
        ) -> AsyncGenerator[TokenDelta, None]:
            async for delta in super().generate(request, rest_s):
                self.abort(request.request_id)
                yield delta

    engine = make_runtime(make_core(context_length=100_000, blocks=8000), kind=AbortingRuntime)
    endless = replace(AGAIN, sampling=replace(AGAIN.sampling, max_tokens=90_000))
    with pytest.raises(ReplayInterrupted):
        await regenerate(engine, endless, "0" * 64, recorded_policy=POLICY)
    engine.close()


# --- forced ---

SHAPES: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": -0.5, "min_tokens": 9},
    "bent": {"logit_bias": ((7, 3.0),), "stop_tokens": (11, 12), "ignore_eos": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 130, 300])
async def test_going_through_the_output_gives_the_bits_of_generating_it(
    engine: EngineRuntime, shape: str, length: int
) -> None:
    request = make_request("recorded", make_prompt(50), length, seed=length, **SHAPES[shape])
    recorded = await record(engine, request)
    steps = engine.metrics().steps
    verdict = await force(
        engine,
        replace(request, request_id="again"),
        digest_of(recorded),
        recorded_policy=POLICY,
        recorded_tokens=recorded.tokens,
    )
    assert (verdict.outcome, verdict.first_difference) == (ReplayOutcome.IDENTICAL, None)
    assert verdict.digest == digest_of(recorded)
    assert engine.metrics().steps - steps <= 1 + (50 + len(recorded.tokens)) // LOOKED_AT_CHUNK


@pytest.mark.parametrize("position", [0, 7, 19])
async def test_a_forced_replay_finds_one_changed_token_where_it_is(engine: EngineRuntime, position: int) -> None:
    recorded = await record(engine)
    claimed = list(recorded.tokens)
    claimed[position] += 1
    verdict = await force(engine, AGAIN, digest_of(recorded), recorded_policy=POLICY, recorded_tokens=claimed)
    assert (verdict.outcome, verdict.first_difference) == (ReplayOutcome.DIFFERENT, position)
    assert verdict.output_tokens == 20


@pytest.mark.parametrize("change", [{"seed": 6}, {"temperature": 0.5}, {"top_k": 3}, {"frequency_penalty": 0.1}])
async def test_a_forced_replay_finds_another_seed_or_constant(engine: EngineRuntime, change: dict[str, Any]) -> None:
    recorded = await record(engine)
    tampered = replace(AGAIN, sampling=replace(AGAIN.sampling, **change))
    verdict = await force(
        engine, tampered, digest_of(recorded), recorded_policy=POLICY, recorded_tokens=recorded.tokens
    )
    assert verdict.outcome is ReplayOutcome.DIFFERENT
    assert verdict.first_difference == 0


async def test_a_forced_replay_never_claims_bits_under_another_policy(engine: EngineRuntime) -> None:
    recorded = await record(engine)
    policy = "sha256:" + "0" * 64
    same = await force(engine, AGAIN, "", recorded_policy=policy, recorded_tokens=recorded.tokens)
    assert same.outcome is ReplayOutcome.CONSISTENT
    claimed = [*recorded.tokens[:-1], recorded.tokens[-1] + 1]
    other = await force(engine, AGAIN, digest_of(recorded), recorded_policy=policy, recorded_tokens=claimed)
    assert (other.outcome, other.first_difference) == (ReplayOutcome.DIFFERENT, 19)


async def test_an_output_of_nothing_is_gone_through_without_the_engine(engine: EngineRuntime) -> None:
    verdict = await force(engine, AGAIN, ReplayDigest().hexdigest(), recorded_policy=POLICY, recorded_tokens=[])
    assert (verdict.outcome, verdict.output_tokens) == (ReplayOutcome.IDENTICAL, 0)


async def test_what_could_not_be_the_output_is_refused_by_name(engine: EngineRuntime) -> None:
    for forced in ((-1,), (50_000,), tuple(range(21))):
        with pytest.raises(RequestRefused, match="forced"):
            await record(engine, replace(AGAIN, forced=forced))
