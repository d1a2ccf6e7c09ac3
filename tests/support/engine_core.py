"""Makes cores on a PagedRunner, and runs them to the end with their integrity checked after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.core import EngineCore
from engine.grammar import Grammars
from engine.limits import EngineLimits
from engine.request import FinishReason, GenerationRequest, GenerationStats, SamplingParams, TokenDelta, TokenLogprob
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.paged_runner import PagedRunner

VOCABULARY = 50_000


@dataclass
class Output:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: bytes | None = None


class Ticks:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_limits(**changes: int) -> EngineLimits:
    values = {
        "context_length": 2048,
        "vocabulary_size": VOCABULARY,
        "max_sequences": 64,
        "token_budget": 512,
        "chunk_tokens": 512,
        "waiting_limit": 256,
        "key_limit": 100_000,
        "trial_rows": 0,
    }
    return EngineLimits(**(values | changes))


def make_core(
    blocks: int = 1024,
    *,
    runner: PagedRunner | None = None,
    clock: Callable[[], float] | None = None,
    adapters: Iterable[str] = (),
    **limits: int,
) -> EngineCore:
    runner = runner or PagedRunner(blocks, VOCABULARY)
    return EngineCore(
        runner,
        make_limits(**limits),
        eos_ids=frozenset({EOS}),
        detokenizer_for=detokenizer_for,
        clock=clock or Ticks(),
        adapters=frozenset(adapters),
    )


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    salt: bytes = b"salt",
    seed: int = 0,
    **sampling: object,
) -> GenerationRequest:
    options: dict[str, Any] = {"logprobs": True} | sampling
    params = SamplingParams(max_tokens=max_tokens, seed=seed, **options)
    return GenerationRequest(request_id, tuple(prompt), params, salt, "tenant")


def make_prompt(length: int, start: int = 1000) -> list[int]:
    return [(start + 7 * index) % VOCABULARY for index in range(length)]


def run_all(
    core: EngineCore,
    requests: Sequence[GenerationRequest],
    *,
    grammars: Grammars | None = None,
    before_step: Callable[[EngineCore, int], None] = lambda core, step: None,
    check: bool = True,
) -> dict[str, Output]:
    """Return the output of each request; integrity is checked after every step unless told otherwise. `grammars` is for
    requests with a structure."""
    outputs = {request.request_id: Output() for request in requests}
    for request in requests:
        structure = request.sampling.structure
        core.add(request, grammars.compile(structure) if grammars is not None and structure is not None else None)
    step = 0
    while core.has_work:
        before_step(core, step)
        for emission in core.step():
            take(outputs[emission.request_id], emission.delta)
        if check:
            assert core.check_integrity() == ()
        step += 1
        assert step < 100_000
    return outputs


def take(output: Output, delta: TokenDelta) -> None:
    output.tokens.extend(delta.tokens)
    output.logprobs.extend(delta.logprobs)
    output.text += delta.text
    output.finish_reason = delta.finish_reason
    output.stats = delta.stats
    output.prompt_logprobs.extend(delta.prompt_logprobs)
    output.embedding = delta.embedding or output.embedding
