"""What one engine can take, and the refusal by name of a request it could never serve.

Everything here is decided before a request touches the loop, so a request that cannot be served fails alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from engine.plan import BLOCK_SIZE
from engine.request import MAX_SEED, ContextTooLong, GenerationRequest, RequestRefused, SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024
MAX_STOP_TOKENS = 16
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_WEIGHT = 1000
MAX_PRIORITY = 1000


class LimitsInvalid(ValueError):
    """A limit disagrees with its declared range; the message names it. The engine must not start."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    context_length: int  # tokens of prompt and output together, ≥ 2
    vocabulary_size: int  # token ids are 0 … vocabulary_size − 1, ≥ 2
    max_sequences: int  # sequences in one step, ≥ 1
    token_budget: int  # tokens computed in one step, ≥ max_sequences, so that every decode gets its one
    chunk_tokens: int  # most prompt tokens of one sequence in one step, ≥ 1; token_budget caps it further
    waiting_limit: int  # sequences that may wait beside the running ones, ≥ 0
    key_limit: int  # sequences of one key, waiting and running, ≥ 1
    trial_rows: int  # tokens of a step up to which some may be guesses, ≥ 0; 0: there are none

    def __post_init__(self) -> None:
        lowest = {"context_length": 2, "vocabulary_size": 2, "waiting_limit": 0, "trial_rows": 0}
        for field in fields(self):
            least = lowest.get(field.name, 1)
            if getattr(self, field.name) < least:
                raise LimitsInvalid(f"`{field.name}` must be at least {least}")
        if self.token_budget < self.max_sequences:
            raise LimitsInvalid("`token_budget` must be at least `max_sequences`")

    @property
    def in_flight(self) -> int:
        """Most sequences held at once, running and waiting together."""
        return self.max_sequences + self.waiting_limit


def blocks_for(tokens: int) -> int:
    """Return how many KV blocks hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)


def refuse_impossible(request: GenerationRequest, limits: EngineLimits, block_count: int) -> None:
    """Return if `request` can be served by an otherwise empty engine of `block_count` blocks.

    Raises: ContextTooLong, RequestRefused; `param` names the field.
    """
    _refuse_prompt(request.prompt, limits)
    refuse_sampling(request.sampling)
    _refuse_token_ids(request.sampling, limits)
    _refuse_forced(request, limits)
    _require(1 <= request.weight <= MAX_WEIGHT, "weight", f"between 1 and {MAX_WEIGHT}")
    _require(abs(request.priority) <= MAX_PRIORITY, "priority", f"between -{MAX_PRIORITY} and {MAX_PRIORITY}")
    _require(not (request.forced and request.pooling), "forced", "left out where a vector is wanted")
    total = min(len(request.prompt) + request.sampling.max_tokens, limits.context_length)
    # The last token is sampled but never computed on, so it takes no slot.
    if blocks_for(total - 1) > block_count:
        fitting = block_count * BLOCK_SIZE + 1
        raise RequestRefused(
            f"prompt and `max_tokens` together exceed the {fitting} tokens the KV cache holds; ask for less",
            "max_tokens",
        )


def refuse_sampling(sampling: SamplingParams) -> None:
    """Return if every sampling parameter lies in its declared range.

    Raises: RequestRefused; `param` names the field.
    """
    _require(sampling.max_tokens >= 1, "max_tokens", "at least 1")
    _require(0 <= sampling.seed <= MAX_SEED, "seed", f"between 0 and {MAX_SEED}")
    # `not (a <= x <= b)` is also true for NaN, so a NaN is refused.
    _require(0 <= sampling.temperature <= MAX_TEMPERATURE, "temperature", f"between 0 and {MAX_TEMPERATURE:g}")
    _require(0 < sampling.top_p <= 1, "top_p", "above 0 and at most 1")
    _require(sampling.top_k >= 0, "top_k", "at least 0")
    _require(0 <= sampling.min_p <= 1 and math.isfinite(sampling.min_p), "min_p", "between 0 and 1")
    _require(0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", f"between 0 and {MAX_TOP_LOGPROBS}")
    _require(sampling.logprobs or sampling.top_logprobs == 0, "top_logprobs", "0 unless `logprobs` is set")
    wanted = sampling.prompt_logprobs
    _require(wanted is None or 0 <= wanted <= MAX_TOP_LOGPROBS, "prompt_logprobs", f"between 0 and {MAX_TOP_LOGPROBS}")
    _require(len(sampling.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
    _refuse_adjustments(sampling)
    _refuse_contradiction(sampling)
    fits = all(1 <= len(text) <= MAX_STOP_CHARACTERS for text in sampling.stop)
    _require(fits, "stop", f"made of strings of 1 to {MAX_STOP_CHARACTERS} characters")


def _refuse_adjustments(sampling: SamplingParams) -> None:
    _require(0 < sampling.repetition_penalty <= MAX_PENALTY, "repetition_penalty", "above 0 and at most 2")
    for name in ("frequency_penalty", "presence_penalty"):
        _require(-MAX_PENALTY <= getattr(sampling, name) <= MAX_PENALTY, name, "between -2 and 2")
    _require(len(sampling.logit_bias) <= MAX_BIASED_TOKENS, "logit_bias", f"of at most {MAX_BIASED_TOKENS} tokens")
    biases = all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in sampling.logit_bias)
    _require(biases, "logit_bias", f"of values between {-MAX_BIAS:g} and {MAX_BIAS:g}")
    _require(len(sampling.allowed_tokens) <= MAX_ALLOWED_TOKENS, "allowed_tokens", f"at most {MAX_ALLOWED_TOKENS} ids")
    _require(len(sampling.stop_tokens) <= MAX_STOP_TOKENS, "stop_tokens", f"at most {MAX_STOP_TOKENS} ids")
    _require(sampling.min_tokens >= 0, "min_tokens", "at least 0")


def _refuse_contradiction(sampling: SamplingParams) -> None:
    if sampling.structure is None:
        return
    for name in ("ignore_eos", "min_tokens", "allowed_tokens"):
        _require(not getattr(sampling, name), name, "left out where the output has a structure")


def _refuse_token_ids(sampling: SamplingParams, limits: EngineLimits) -> None:
    """Refuse ids that are not in the vocabulary, or not once each and ascending: what is recorded has one form."""
    for name, ids in (
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
        ("allowed_tokens", list(sampling.allowed_tokens)),
        ("stop_tokens", list(sampling.stop_tokens)),
    ):
        known = not ids or (ids[0] >= 0 and ids[-1] < limits.vocabulary_size)
        _require(known and ids == sorted(set(ids)), name, "of token ids of the vocabulary, ascending")


def refuse_choiceless(sampling: SamplingParams, ending: frozenset[int], limits: EngineLimits) -> None:
    """Refuse a request that must go on where everything it may say would end it. `ending`: the ids that end it."""
    if sampling.min_tokens == 0:
        return
    allowed = sampling.allowed_tokens
    left = not ending.issuperset(allowed) if allowed else len(ending) < limits.vocabulary_size
    _require(left, "min_tokens", "0 where every allowed token ends the output")


def _refuse_prompt(prompt: tuple[int, ...], limits: EngineLimits) -> None:
    if not prompt:
        raise RequestRefused("`prompt` must hold at least one token", "prompt")
    if len(prompt) + 1 > limits.context_length:
        raise ContextTooLong(
            f"`prompt` has {len(prompt)} tokens; the context holds {limits.context_length} with at least one to "
            "generate; shorten it",
            "prompt",
        )
    # A stray id would read outside the embedding and take every other request down with it.
    if min(prompt) < 0 or max(prompt) >= limits.vocabulary_size:
        raise RequestRefused("`prompt` holds a token id outside the vocabulary", "prompt")


def _refuse_forced(request: GenerationRequest, limits: EngineLimits) -> None:
    forced = request.forced
    if not forced:
        return
    room = min(request.sampling.max_tokens, limits.context_length - len(request.prompt))
    _require(len(forced) <= room, "forced", "at most `max_tokens` long, and fit the context with the prompt")
    known = min(forced) >= 0 and max(forced) < limits.vocabulary_size
    _require(known, "forced", "of token ids of the vocabulary")


def _require(holds: bool, param: str, expected: str) -> None:
    if not holds:
        raise RequestRefused(f"`{param}` must be {expected}", param)
