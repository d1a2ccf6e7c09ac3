"""Replay: have a recorded answer come out again, and compare bit for bit.

`regenerate` runs the request again, one step a token. `force` goes through the recorded output in one pass, as if it
were a prompt, and asks after each of its tokens what would have been sampled: the bits are the same, because those of a
position depend on what stands before it and not on how it was computed, and one prefill takes the place of all steps.

The replay digest is SHA-256 over one 8-byte entry per output position, in order:

    u32 token id, little-endian ‖ float32 logprob, its IEEE 754 bits, little-endian
    e.g. token 7 with logprob −0.5, then token 300 with logprob 0.0:
         07000000 000000bf 2c010000 00000000
         → 5822f26e… (tests/unit/engine/test_replay.py holds it whole)

The end-of-sequence token, where one was sampled, is the last position. Equal digests under one numeric policy mean that
every token and every logprob was repeated in its bits; across policies bits are never claimed to be equal.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import zip_longest

from engine.request import Engine, EngineError, FinishReason, GenerationRequest, GenerationStats

_ENTRY = struct.Struct("<If")


class ReplayInterrupted(EngineError):
    """The replay ended before the recorded output did; it says nothing about the recording. Run it again."""


class ReplayDigest:
    """The rolling digest of one output."""

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, token: int, logprob: float) -> None:
        self._hash.update(_ENTRY.pack(token, logprob))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class ReplayOutcome(StrEnum):
    IDENTICAL = "identical"  # every token and logprob bit repeated, under the recorded numeric policy
    CONSISTENT = "consistent"  # every token repeated, under another numeric policy: bits are not compared
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class ReplayVerdict:
    outcome: ReplayOutcome
    first_difference: int | None  # output position, 0 the first; None if none differs or only logprobs are known to
    digest: str  # of the replayed output
    output_tokens: int  # replayed


async def regenerate(
    engine: Engine,
    request: GenerationRequest,
    recorded_digest: str,
    *,
    recorded_policy: str,
    recorded_tokens: Sequence[int] | None = None,
) -> ReplayVerdict:
    """Run `request` again and return how its output compares with the recorded one.

    `request.request_id` must be new: nothing the recorded request left in the prefix cache is reused, and nothing of
    the replay is left to others. With `recorded_tokens` an output that was cut short (client gone, halted) is compared
    as far as it went, and the first differing position is named.

    Raises: RequestRefused, EngineOverloaded, EngineDraining, EngineDead; ReplayInterrupted if the replay was aborted.
    """
    same_policy = engine.numeric_policy == recorded_policy
    if recorded_tokens is not None and not recorded_tokens:
        return _verdict([], ReplayDigest().hexdigest(), recorded_digest, recorded_tokens, same_policy)
    tokens, stats = await _run(engine, _replayable(request, recorded_tokens))
    return _verdict(tokens, stats.replay_digest, recorded_digest, recorded_tokens, same_policy)


async def force(
    engine: Engine,
    request: GenerationRequest,
    recorded_digest: str,
    *,
    recorded_policy: str,
    recorded_tokens: Sequence[int],
) -> ReplayVerdict:
    """Go through the recorded output of `request` and return how what would have been sampled compares with it.

    Each position is looked at after the recorded tokens before it: the first difference is the first token that would
    have been another. `request.request_id` must be new, as for `regenerate`.

    Raises: as `regenerate`.
    """
    same_policy = engine.numeric_policy == recorded_policy
    if not recorded_tokens:
        return _verdict([], ReplayDigest().hexdigest(), recorded_digest, recorded_tokens, same_policy)
    forced = replace(_replayable(request, recorded_tokens), forced=tuple(recorded_tokens))
    tokens, stats = await _run(engine, forced)
    return _verdict(tokens, stats.replay_digest, recorded_digest, recorded_tokens, same_policy)


async def embed_again(engine: Engine, request: GenerationRequest, recorded_digest: str) -> ReplayVerdict:
    """Make the vector of `request.prompt` again and return how its bits compare with those recorded under the same
    numeric policy.

    Raises: as `regenerate`.
    """
    _, stats = await _run(engine, _replayable(request, None))
    same = stats.replay_digest == recorded_digest
    return ReplayVerdict(ReplayOutcome.IDENTICAL if same else ReplayOutcome.DIFFERENT, None, stats.replay_digest, 0)


def _replayable(request: GenerationRequest, recorded_tokens: Sequence[int] | None) -> GenerationRequest:
    salt = hashlib.sha256(b"probity/replay-salt/1" + request.request_id.encode()).digest()
    sampling = request.sampling
    if recorded_tokens is not None:
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, len(recorded_tokens)))
    return replace(request, cache_salt=salt, sampling=sampling)


async def _run(engine: Engine, request: GenerationRequest) -> tuple[list[int], GenerationStats]:
    tokens: list[int] = []
    async for delta in engine.generate(request):
        tokens.extend(delta.tokens)
        if delta.finish_reason is FinishReason.ABORT:
            break
        if delta.stats is not None:
            return tokens, delta.stats
    raise ReplayInterrupted("the replay was aborted before it ended; run it again")


def _verdict(
    tokens: Sequence[int],
    digest: str,
    recorded_digest: str,
    recorded_tokens: Sequence[int] | None,
    same_policy: bool,
) -> ReplayVerdict:
    first = None if recorded_tokens is None else _first_difference(tokens, recorded_tokens)
    if same_policy:
        outcome = ReplayOutcome.IDENTICAL if digest == recorded_digest and first is None else ReplayOutcome.DIFFERENT
    elif recorded_tokens is None:
        # Bits may differ by right and the tokens are unknown: nothing positive can be claimed.
        outcome = ReplayOutcome.DIFFERENT
    else:
        outcome = ReplayOutcome.CONSISTENT if first is None else ReplayOutcome.DIFFERENT
    return ReplayVerdict(outcome, first, digest, len(tokens))


def _first_difference(tokens: Sequence[int], recorded: Sequence[int]) -> int | None:
    pairs = zip_longest(tokens, recorded)
    return next((position for position, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
