"""What is looked at in a step: the engine's own token for every wish, and a row's bits whatever its neighbours wish."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import looks as module
from engine.looks import TIERS, Look, Looks
from engine.plan import Draw, RowPlan, Score
from engine.request import SamplingParams, TokenLogprob
from engine.sampler import adjust, sample
from engine.transfer import Outbox, fetch
from kernels.jit import INTERPRETED
from tests.support.sampling import random_request

VOCABULARY = 67  # no row but every fourth begins where a kernel wants one to
COUNT = 16 if INTERPRETED else 400


def carried_out(looks: list[Look], logits: torch.Tensor, device: torch.device) -> list[TokenLogprob]:
    """Look at logits as if they were hidden states, each its own."""
    outbox = Outbox()
    chosen = Looks(looks, logits.shape[1], outbox)
    results = chosen.carry_out(outbox.send(device), logits.to(device), lambda rows: rows)
    return chosen.read(iter(fetch(results)))


def look(at: int, params: SamplingParams, draw: Draw, start: int = 0) -> Look:
    return Look(at, RowPlan((1,) * (draw.offset + 1), start, (), params, (draw,)), draw)


def random_look(at: int, generator: torch.Generator) -> Look:
    one = random_request(VOCABULARY, generator)
    tokens = torch.randperm(VOCABULARY, generator=generator)[:30].tolist()
    params = replace(
        one.params,
        logprobs=at % 3 > 0,
        top_logprobs=(0, 4, 17)[at % 3],
        allowed_tokens=tuple(range(at, VOCABULARY)) if at % 5 == 0 else (),
    )
    asked = replace(one.draw, offset=at % 4, banned=tuple(tokens) if at % 4 == 0 else ())
    left = adjust(np.zeros(VOCABULARY, dtype=np.float32), params, asked)
    return look(at, params if np.isfinite(left).any() else replace(params, allowed_tokens=()), asked, start=7 * at)


@pytest.fixture
def drawn(generator: torch.Generator) -> tuple[list[Look], torch.Tensor]:
    looks = [random_look(at, generator) for at in range(COUNT)]
    return looks, 3 * torch.randn(COUNT, VOCABULARY, generator=generator)


def test_every_wish_draws_what_it_draws_on_a_cpu(drawn: tuple[list[Look], torch.Tensor], device: torch.device) -> None:
    looks, logits = drawn
    logprobs = torch.log_softmax(logits, dim=-1)
    for one, found in zip(looks, carried_out(looks, logits, device), strict=True):
        assert isinstance(one.asked, Draw)
        expected = sample(logits[one.at].numpy(), one.row.sampling, one.row.position(one.asked), one.asked)
        assert found.token == expected
        assert abs(found.logprob - float(logprobs[one.at, expected])) < 1e-5
        best = torch.sort(logprobs[one.at], descending=True, stable=True)
        assert [token for token, _ in found.top] == best.indices[: one.alternatives].tolist()
        values = torch.tensor([value for _, value in found.top])
        torch.testing.assert_close(values, best.values[: one.alternatives], atol=1e-5, rtol=0)


def test_a_look_finds_alone_what_it_finds_among_others_of_other_wishes(
    drawn: tuple[list[Look], torch.Tensor], device: torch.device
) -> None:
    looks, logits = drawn
    scored = [
        Look(one.at, replace(one.row, sampling=SamplingParams(1, 0, prompt_logprobs=at)), Score(0, 5))
        for at, one in enumerate(looks[:3])
    ]
    together = carried_out([*looks[::-1], *scored], logits, device)
    chosen = range(0, COUNT, 5)
    for at in chosen:
        assert carried_out([looks[at]], logits, device) == [together[COUNT - 1 - at]]
    for at, one in enumerate(scored):
        (found,) = carried_out([one], logits, device)
        assert found == together[COUNT + at]
        assert (found.token, len(found.top)) == (5, at)


def test_more_looks_than_are_in_memory_at_once_are_each_looked_at(
    device: torch.device, generator: torch.Generator
) -> None:
    count, most = (9, 4) if INTERPRETED else (2 * module.TOGETHER + 1, module.TOGETHER)
    logits = torch.randn(count, VOCABULARY, generator=generator)
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    looks = [look(at, greedy, Draw(0)) for at in range(count)]
    outbox = Outbox()
    chosen = Looks(looks, VOCABULARY, outbox, together=most)
    found = chosen.read(iter(fetch(chosen.carry_out(outbox.send(device), logits.to(device), lambda rows: rows))))
    assert [one.token for one in found] == logits.argmax(dim=-1).tolist()


def test_what_a_mask_does_not_reach_is_ruled_out(device: torch.device) -> None:
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    rising = torch.arange(VOCABULARY).float()[None]
    for mask, token in ((b"\x06", 2), (b"\xff", 7), (b"\x01" + bytes(40), 0)):
        (found,) = carried_out([look(0, greedy, Draw(0, mask=mask))], rising, device)
        assert found.token == token


def test_nothing_is_looked_at_where_nothing_is_asked(device: torch.device) -> None:
    assert carried_out([], torch.zeros(3, VOCABULARY), device) == []


def test_kernels_are_compiled_for_few_numbers_of_biases_and_alternatives() -> None:
    biased = [SamplingParams(1, 0, logit_bias=tuple((token, 1.0) for token in range(n))) for n in (0, 1, 16, 17, 1024)]
    assert [look(0, params, Draw(0)).kind.biases for params in biased] == [0, 16, 16, 64, 1024]
    asked = [SamplingParams(1, 0, logprobs=True, top_logprobs=n) for n in range(21)]
    assert {look(0, params, Draw(0)).kind.tier for params in asked} == set(TIERS)
