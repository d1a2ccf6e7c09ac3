"""Sequence: one request's tokens in flight, and the blocks their keys and values lie in.

Knows nothing of text, time or other sequences. The scheduler moves it along; who owns which tokens:

    tokens    │ prompt ………………………… │ output ……………… │      all fixed once appended, never taken back
    computed  │ keys and values lie in `blocks` │ pending … │  preemption sets `computed` to 0, tokens stay
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable
from enum import StrEnum

from engine.blocks import chain_key, root_key
from engine.grammar import GrammarState
from engine.limits import blocks_for
from engine.lookup import PromptLookup
from engine.plan import BLOCK_SIZE, Draw, PastTokens, Pool, Reading, RowPlan, Score
from engine.request import GenerationRequest, Pooling, TokenLogprob


class SequenceStatus(StrEnum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    FINISHED = "finished"  # holds no blocks, is in no queue


class Sequence:
    __slots__ = (
        "_block_table",
        "_blocks",
        "_grammar",
        "_guessed",
        "_keys",
        "_lookup",
        "_past",
        "_pooled",
        "arrival",
        "cached_tokens",
        "computed",
        "drawn",
        "ending",
        "preemptions",
        "prompt_length",
        "published",
        "request",
        "scored",
        "status",
        "tokens",
    )

    def __init__(
        self,
        request: GenerationRequest,
        arrival: int,
        eos_ids: frozenset[int] = frozenset(),
        grammar: GrammarState | None = None,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.arrival = arrival  # order of arrival
        self.tokens: list[int] = [*request.prompt, *request.forced[:-1]]  # after its last token nothing is looked for
        self.prompt_length = len(request.prompt)
        self.computed = 0  # tokens whose keys and values lie in the blocks
        self.published = 0  # leading blocks already offered to the prefix cache
        self.cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None until first admitted
        self.drawn = 0  # tokens sampled so far
        self.ending = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else eos_ids)
        self.preemptions = 0
        self.status = SequenceStatus.WAITING
        self._blocks: list[int] = []
        self._block_table: tuple[int, ...] | None = ()  # None: `_blocks` grew since it was made
        self._keys: list[bytes] = []  # of the leading full blocks, as far as anyone asked
        self._past = PastTokens(request.prompt) if sampling.looks_back else None
        self._grammar = grammar  # where the output stands in its structure
        self.scored: list[TokenLogprob] = []  # of the prompt's tokens from the second on
        self._pooled: bytes | None = None  # of the tokens computed so far
        self._lookup: PromptLookup | None = None  # where guesses come from
        self._guessed: tuple[int, ...] = ()  # tokens that the row under way computes on trial

    def take(self, token: int) -> None:
        """Take up a token that was sampled. Of a forced output the next one is known, whatever was sampled."""
        if self.request.forced:
            token = self.request.forced[self.drawn]
        else:
            self.tokens.append(token)
        self.drawn += 1
        if self._past is not None:
            self._past.add(token)
        if self._grammar is not None and token not in self.ending:
            self._grammar.take(token)

    def allow_guesses(self, most: int) -> None:
        """Compute on up to `most` guessed tokens a step, where what is sampled depends on the model's view alone."""
        asked = self.request
        if most and self._grammar is None and self._past is None and not asked.forced and asked.pooling is None:
            self._lookup = PromptLookup(most)

    def guess(self, room: int) -> None:
        """Guess up to `room` tokens that follow the one pending, for the next row."""
        left = self.prompt_length + self.request.sampling.max_tokens - len(self.tokens) - 1
        room = min(room, left)
        self._guessed = self._lookup.guess(self.tokens, room) if self._lookup is not None and room > 0 else ()

    def settle(self, sampled: abc.Sequence[TokenLogprob]) -> abc.Sequence[TokenLogprob]:
        """Return what holds of the tokens sampled after a row: as far as each followed what came true."""
        guessed, self._guessed = self._guessed, ()
        if not guessed or self._lookup is None:
            return sampled
        right = 0
        while right < len(guessed) and sampled[right].token == guessed[right] and guessed[right] not in self.ending:
            right += 1
        self._lookup.learn(len(guessed), right)
        return sampled[: right + 1]

    def drop_guesses(self) -> None:
        self._guessed = ()

    def read(self, reading: Reading) -> None:
        """Take up what a step showed of the prompt."""
        self.scored.extend(reading.scored)
        if reading.pooled is not None:
            self._pooled = reading.pooled

    @property
    def pooled(self) -> bytes | None:
        """What was pooled of the whole prompt; None while there is more of it."""
        return self._pooled if self.pending == 0 else None

    @property
    def failed(self) -> bool:
        """Whether nothing more can be sampled: the grammar met a bound."""
        return self._grammar is not None and self._grammar.failed and not self.request.forced

    @property
    def reusable(self) -> int:
        """Return how many leading tokens may come from the cache: what is yet to be looked at must be computed."""
        if self.request.pooling is Pooling.MEAN:
            return 0
        if self.request.sampling.prompt_logprobs is not None and len(self.scored) < self.prompt_length - 1:
            return len(self.scored)
        return self.prompt_length + self.drawn - 1 if self.request.forced else len(self.tokens) - 1

    @property
    def pending(self) -> int:
        """Tokens known but not computed: 1 while decoding, more while prefilling or recomputing."""
        return len(self.tokens) - self.computed

    @property
    def blocks(self) -> list[int]:
        return self._blocks

    @property
    def block_table(self) -> tuple[int, ...]:
        if self._block_table is None:
            self._block_table = tuple(self._blocks)
        return self._block_table

    def missing_blocks(self, count: int) -> int:
        """Return how many more blocks the next `count` tokens need."""
        return blocks_for(self.computed + count) - len(self._blocks)

    def key(self, index: int) -> bytes:
        """Return the prefix-cache key of block `index`; its BLOCK_SIZE tokens must be known."""
        while len(self._keys) <= index:
            parent = self._keys[-1] if self._keys else root_key(self.request.cache_salt, self.request.adapter)
            start = len(self._keys) * BLOCK_SIZE
            self._keys.append(chain_key(parent, self.tokens[start : start + BLOCK_SIZE]))
        return self._keys[index]

    def admit(self, hits: Iterable[int]) -> None:
        """Start running on `hits`: the blocks found for the leading tokens, already held for this sequence."""
        self._blocks = list(hits)
        self._block_table = None
        self.computed = len(self._blocks) * BLOCK_SIZE
        self.published = len(self._blocks)
        self.status = SequenceStatus.RUNNING
        if self.cached_tokens is None:
            self.cached_tokens = self.computed

    def extend(self, blocks: Iterable[int]) -> None:
        self._blocks.extend(blocks)
        self._block_table = None

    def give_up_blocks(self, status: SequenceStatus) -> list[int]:
        """Leave RUNNING for `status`; return the blocks held so far, for release."""
        blocks, self._blocks, self._block_table = self._blocks, [], ()
        self.computed = self.published = 0
        self._pooled, self._guessed = None, ()
        self.status = status
        return blocks

    def row(self, count: int) -> RowPlan:
        """Return this sequence's share of a step: its next `count` pending tokens.

        It samples if they end the pending; of a forced output, after each token that was not sampled after before.
        """
        tokens = (self.tokens[-1], *self._guessed) if count == self.pending == 1 else self._next(count)
        if self.request.forced:
            draws = self._forced_draws(count)
        elif self.request.pooling is not None or self.computed + count < len(self.tokens):
            draws = ()
        else:
            mask = self._grammar.mask if self._grammar is not None else None
            draws = (Draw(count - 1, self._past, self._banned(self.drawn), mask), *self._trials())
        return RowPlan(
            tokens,
            self.computed,
            self.block_table,
            self.request.sampling,
            draws,
            self._scores(count) if self.request.sampling.prompt_logprobs is not None else (),
            self._pool(count),
            self.request.adapter,
        )

    def _trials(self) -> tuple[Draw, ...]:
        """Return the draws after guessed tokens, which follow the one after the pending."""
        return tuple(Draw(at, banned=self._banned(self.drawn + at)) for at in range(1, len(self._guessed) + 1))

    def _scores(self, count: int) -> tuple[Score, ...]:
        """Return the tokens of the prompt that are looked for after the next `count`, and were not yet."""
        first = max(self.computed + 1, len(self.scored) + 1)
        after = range(first, min(self.computed + count + 1, self.prompt_length))
        return tuple(Score(index - 1 - self.computed, self.tokens[index]) for index in after)

    def _pool(self, count: int) -> Pool | None:
        pooling = self.request.pooling
        if pooling is None or (pooling is Pooling.LAST and count < self.pending):
            return None
        return Pool(pooling, self._pooled)

    def _next(self, count: int) -> tuple[int, ...]:
        return tuple(self.tokens[self.computed : self.computed + count])

    def _banned(self, index: int) -> tuple[int, ...]:
        """Return what output token `index` must not be."""
        return tuple(self.ending) if index < self.request.sampling.min_tokens else ()

    def _forced_draws(self, count: int) -> tuple[Draw, ...]:
        past = self._past.copy() if self._past is not None else None
        grammar = self._grammar.copy() if self._grammar is not None else None
        draws = []
        for index in range(self.drawn, len(self.request.forced)):
            offset = self.prompt_length - 1 + index - self.computed
            if offset >= count:
                break
            token = self.request.forced[index]
            draws.append(Draw(offset, past, self._banned(index), grammar.mask if grammar is not None else None))
            if past is not None:
                past = past.copy()
                past.add(token)
            if grammar is not None and token not in self.ending:
                grammar.take(token)  # one that may not come is the difference that a replay looks for
        return tuple(draws)
