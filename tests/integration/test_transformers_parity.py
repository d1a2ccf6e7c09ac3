"""The decoder against `transformers`: the same logits within bfloat16, and the same greedy tokens.

Tolerances are not chosen but measured: float32 arithmetic on the same weights is the reference, and what
`transformers` itself loses in bfloat16 is the yardstick. Greedy tokens can differ from it by right only where the
reference's best two logits are closer than that loss, and only there is a difference let pass.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.request import Pooling
from tests.support.engine_core import make_request, run_all
from tests.support.model_engine import load_model, logits_of, model_core
from tests.support.reference import Reference, load_reference
from tests.support.tiny_models import FAMILIES, VOCABULARY

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 513, 700)
NEW_TOKENS = 20
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return list(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_close_to_float32_as_those_of_transformers_in_bfloat16(
    family: str, tiny_models: dict[str, Path]
) -> None:
    model, other = load_model(tiny_models[family]), load_reference(tiny_models[family])
    prompts = [prompt_of(length) for length in LENGTHS]
    for prompt, ours in zip(prompts, logits_of(model, prompts), strict=True):
        exact, rounded = other.logits(prompt)
        spread = float(exact.std())
        assert float((ours - exact).abs().max()) < 0.2 * spread
        assert float((ours - exact).pow(2).mean().sqrt()) < 1.25 * float((rounded - exact).pow(2).mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_the_same_logit_bits_alone_as_in_a_batch(family: str, tiny_models: dict[str, Path]) -> None:
    model = load_model(tiny_models[family])
    prompts = [prompt_of(length) for length in LENGTHS]
    for prompt, together in zip(prompts, logits_of(model, prompts), strict=True):
        assert torch.equal(logits_of(model, [prompt])[0], together)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers_except_at_ties(family: str, tiny_models: dict[str, Path]) -> None:
    model, other = load_model(tiny_models[family]), load_reference(tiny_models[family])
    requests = [make_request(str(length), prompt_of(length), NEW_TOKENS, **GREEDY) for length in LENGTHS]
    batched = run_all(model_core(model), requests)
    whole = 0
    for length, request in zip(LENGTHS, requests, strict=True):
        ours = batched[str(length)].tokens
        assert run_all(model_core(model), [request])[str(length)].tokens == ours
        theirs = other.generate(prompt_of(length), NEW_TOKENS)
        whole += ours == theirs
        assert_greedy(other, prompt_of(length), ours)
    assert whole >= len(LENGTHS) // 2  # the rest left the path at a tie


def assert_greedy(other: Reference, prompt: list[int], output: list[int]) -> None:
    """Every token of `output`, given those before it, is the reference's best, or tied with it within bfloat16."""
    exact, rounded = other.logits(prompt + output)
    loss = float((rounded - exact).abs().max())
    for position, token in enumerate(output, len(prompt) - 1):
        behind = float(exact[position].max() - exact[position, token])
        assert behind <= 2 * loss


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_log_probabilities_of_a_prompt_are_those_of_the_model(
    family: str, tiny_models: dict[str, Path]
) -> None:
    other = load_reference(tiny_models[family])
    for length in (2, 17, 300):
        prompt = prompt_of(length)
        with torch.inference_mode():
            answer = other.exact(torch.tensor([prompt]), output_hidden_states=True)
            rounded = other.rounded(torch.tensor([prompt])).logits[0].float()
        states, logits = answer.hidden_states[-1][0].double(), answer.logits[0]
        for pooling, wanted in ((Pooling.MEAN, states.mean(dim=0)), (Pooling.LAST, states[-1])):
            request = replace(make_request("r", prompt, 1), pooling=pooling)
            vector = run_all(model_core(load_model(tiny_models[family]), chunk_tokens=64), [request])["r"].embedding
            assert vector is not None
            ours = torch.frombuffer(bytearray(vector), dtype=torch.float32).double()
            assert abs(float(ours.norm()) - 1) < 1e-6
            assert float(ours @ wanted / wanted.norm()) > 0.999
        request = make_request("r", prompt, 1, prompt_logprobs=3)
        scored = run_all(model_core(load_model(tiny_models[family]), chunk_tokens=64), [request])["r"].prompt_logprobs
        exact, tolerance = torch.log_softmax(logits, dim=-1), float((rounded - logits).abs().max())
        assert [one.token for one in scored] == prompt[1:]
        for position, one in enumerate(scored):
            assert abs(one.logprob - float(exact[position, one.token])) < 2 * tolerance
            assert [rank for _, rank in one.top] == sorted((rank for _, rank in one.top), reverse=True)
