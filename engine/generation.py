"""Generation: the output side of one request. Turns sampled tokens into deltas and decides when they end.

Knows nothing of blocks or steps. Time is handed in, in seconds of any clock that does not go back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from engine.pooling import embedding
from engine.replay import ReplayDigest
from engine.request import FinishReason, GenerationStats, SamplingParams, TokenDelta, TokenLogprob
from engine.sequence import Sequence as TokenSequence


class Detokenizer(Protocol):
    """Tokens of one output → text as it becomes certain. Ours is `tokenizer.IncrementalDetokenizer`.

    Text is held back while it may still be part of a stop string or of an incomplete UTF-8 sequence.
    """

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text now certain, and whether a stop string was completed: it and what follows it is dropped."""
        ...

    def finish(self) -> str:
        """Return what is still held back, once no token will follow."""
        ...


DetokenizerFor = Callable[[SamplingParams], Detokenizer]


class Generation:
    __slots__ = (
        "_admitted_at",
        "_arrived_at",
        "_detokenizer",
        "_digest",
        "_first_token_at",
        "_limit",
        "_taken",
        "sequence",
    )

    def __init__(
        self, sequence: TokenSequence, detokenizer: Detokenizer, *, context_length: int, arrived_at: float
    ) -> None:
        self.sequence = sequence
        self._detokenizer = detokenizer
        self._digest = ReplayDigest()
        self._limit = min(sequence.request.sampling.max_tokens, context_length - sequence.prompt_length)
        self._taken = 0  # tokens of the output
        self._arrived_at = arrived_at
        self._admitted_at: float | None = None
        self._first_token_at: float | None = None

    @property
    def output_tokens(self) -> int:
        return self._taken

    def admitted(self, now: float) -> None:
        """Note that the sequence started to run; only the first time counts."""
        if self._admitted_at is None:
            self._admitted_at = now

    def accept(self, sampled: Sequence[TokenLogprob], now: float) -> TokenDelta:
        """Return the delta of what a step sampled: one token, more of a forced output or where guesses came true. Its
        finish reason, if any, ends the request."""
        if self._first_token_at is None:
            self._first_token_at = now
        scored = tuple(self.sequence.scored) if self._taken == 0 else ()
        text, reason, count = "", None, 0
        while count < len(sampled) and reason is None:  # what was sampled after the end is not of the output
            self._digest.update(sampled[count].token, sampled[count].logprob)
            self._taken += 1
            more, reason = self._compare() if self.sequence.request.forced else self._read(sampled[count].token)
            text += more
            count += 1
        taken = tuple(sampled[:count])
        logprobs = taken if self.sequence.request.sampling.logprobs else ()
        stats = self._stats(now) if reason is not None else None
        return TokenDelta(text, tuple(one.token for one in taken), logprobs, reason, stats, scored)

    def embed(self, pooled: bytes, now: float) -> TokenDelta:
        """Return the one delta of a request for a vector."""
        vector = embedding(pooled)
        stats = replace(self._stats(now), replay_digest=hashlib.sha256(vector).hexdigest())
        return TokenDelta("", (), (), FinishReason.STOP, stats, embedding=vector)

    def abort(self, now: float) -> TokenDelta:
        """Return the closing delta of a request that is cut short: the text held back, and no token."""
        return TokenDelta(self._detokenizer.finish(), (), (), FinishReason.ABORT, self._stats(now))

    def _compare(self) -> tuple[str, FinishReason | None]:
        """A forced output says nothing and ends where it ends."""
        ended = self._taken >= len(self.sequence.request.forced)
        return "", FinishReason.LENGTH if ended else None

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self.sequence.ending:
            return self._detokenizer.finish(), FinishReason.STOP
        text, stopped = self._detokenizer.push((token,))
        if stopped:
            return text, FinishReason.STOP
        if self._taken >= self._limit:
            return text + self._detokenizer.finish(), FinishReason.LENGTH
        return text, None

    def _stats(self, now: float) -> GenerationStats:
        """A request that ended before it was admitted, or before its first token, has waited for it all its time."""
        admitted_at = now if self._admitted_at is None else self._admitted_at
        first_token_at = now if self._first_token_at is None else self._first_token_at
        return GenerationStats(
            prompt_tokens=self.sequence.prompt_length,
            cached_tokens=self.sequence.cached_tokens or 0,
            output_tokens=self.output_tokens,
            preemptions=self.sequence.preemptions,
            queued_s=admitted_at - self._arrived_at,
            first_token_s=first_token_at - self._arrived_at,
            total_s=now - self._arrived_at,
            replay_digest=self._digest.hexdigest(),
        )
