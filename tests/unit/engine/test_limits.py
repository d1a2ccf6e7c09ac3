from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest

from engine.limits import LimitsInvalid, blocks_for, refuse_choiceless, refuse_impossible, refuse_sampling
from engine.request import MAX_SEED, ContextTooLong, RequestRefused, SamplingParams
from tests.support.engine_core import VOCABULARY, make_limits, make_request

SAMPLING = SamplingParams(max_tokens=1, seed=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"context_length": 1}, "context_length"),
        ({"vocabulary_size": 1}, "vocabulary_size"),
        ({"max_sequences": 0}, "max_sequences"),
        ({"token_budget": 63}, "token_budget"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"waiting_limit": -1}, "waiting_limit"),
    ],
)
def test_a_limit_outside_its_range_is_refused_by_name(changes: dict[str, int], named: str) -> None:
    with pytest.raises(LimitsInvalid, match=f"`{named}`"):
        make_limits(**changes)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_are_rounded_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("allowed_tokens", tuple(range(1025))),
        ("stop_tokens", tuple(range(17))),
        ("min_tokens", -1),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", ("x",) * 17),
    ],
)
def test_a_sampling_parameter_outside_its_range_is_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(RequestRefused, match=f"`{param}`") as refusal:
        refuse_sampling(replace(SAMPLING, **{param: value}))
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("logit_bias", ((VOCABULARY, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((4, 1.0), (3, 1.0))),
        ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("allowed_tokens", (1, VOCABULARY)),
        ("allowed_tokens", (2, 1)),
        ("stop_tokens", (7, 7)),
        ("stop_tokens", (-1,)),
    ],
)
def test_token_ids_are_of_the_vocabulary_once_each_and_ascending(param: str, value: object) -> None:
    request = make_request("r", [1], **{param: value})
    with pytest.raises(RequestRefused, match=f"`{param}`") as refusal:
        refuse_impossible(request, make_limits(), 100)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("allowed", "ending", "least", "refused"),
    [
        ((1, 2), {1, 2, 3}, 1, True),
        ((1, 2), {1}, 1, False),
        ((1, 2), {1, 2}, 0, False),
        ((), {0, 1, 2}, 1, True),
        ((), {0, 1}, 9, False),
    ],
)
def test_who_must_go_on_must_have_something_to_say(
    allowed: tuple[int, ...], ending: set[int], least: int, refused: bool
) -> None:
    sampling = replace(SAMPLING, allowed_tokens=allowed, min_tokens=least)
    with pytest.raises(RequestRefused, match="min_tokens") if refused else nullcontext():
        refuse_choiceless(sampling, frozenset(ending), make_limits(vocabulary_size=3))


def test_the_ends_of_every_range_are_accepted() -> None:
    refuse_sampling(SAMPLING)
    widest = SamplingParams(
        max_tokens=2**40,
        seed=MAX_SEED,
        temperature=2.0,
        top_p=1.0,
        top_k=2**40,
        min_p=1.0,
        stop=("x" * 256,) * 16,
        logit_bias=tuple((token, -100.0) for token in range(1024)),
        repetition_penalty=2.0,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        allowed_tokens=tuple(range(1024)),
        stop_tokens=tuple(range(16)),
        min_tokens=2**40,
        logprobs=True,
        top_logprobs=20,
    )
    refuse_sampling(widest)
    refuse_sampling(replace(SAMPLING, temperature=0.0, top_p=5e-324, min_p=0.0))


@pytest.mark.parametrize("prompt", [(), (-1,), (VOCABULARY,), (3, VOCABULARY + 5, 4)])
def test_an_empty_prompt_or_a_stray_token_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(RequestRefused, match="`prompt`") as refusal:
        refuse_impossible(make_request("r", prompt), make_limits(), 100)
    assert refusal.value.param == "prompt"
    assert str(VOCABULARY + 5) not in str(refusal.value)


def test_a_prompt_must_leave_room_for_one_token_of_output() -> None:
    limits = make_limits(context_length=32)
    refuse_impossible(make_request("r", [1] * 31, max_tokens=500), limits, 100)
    with pytest.raises(ContextTooLong, match="`prompt` has 32 tokens"):
        refuse_impossible(make_request("r", [1] * 32, max_tokens=1), limits, 100)


def test_a_request_that_needs_more_blocks_than_exist_is_refused_at_the_exact_token() -> None:
    limits = make_limits(context_length=1000)
    refuse_impossible(make_request("r", [1] * 20, max_tokens=13), limits, 2)
    with pytest.raises(RequestRefused, match="33 tokens") as refusal:
        refuse_impossible(make_request("r", [1] * 20, max_tokens=14), limits, 2)
    assert refusal.value.param == "max_tokens"


def test_tokens_beyond_the_context_need_no_blocks() -> None:
    refuse_impossible(make_request("r", [1] * 20, max_tokens=10**9), make_limits(context_length=33), 2)
