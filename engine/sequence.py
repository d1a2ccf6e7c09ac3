"""Sequence: one request's tokens in flight, and the blocks their keys and values lie in.

Knows nothing of text, time or other sequences. The scheduler moves it along; who owns which tokens:

    tokens    │ prompt ………………………… │ output ……………… │      all fixed once appended, never taken back
    computed  │ keys and values lie in `blocks` │ pending … │  preemption sets `computed` to 0, tokens stay
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from engine.blocks import chain_key, root_key
from engine.limits import blocks_for
from engine.plan import BLOCK_SIZE, PastTokens, RowPlan
from engine.request import GenerationRequest


class SequenceStatus(StrEnum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    FINISHED = "finished"  # holds no blocks, is in no queue


class Sequence:
    __slots__ = (
        "_block_table",
        "_blocks",
        "_keys",
        "_past",
        "arrival",
        "cached_tokens",
        "computed",
        "ending",
        "preemptions",
        "prompt_length",
        "published",
        "request",
        "status",
        "tokens",
    )

    def __init__(self, request: GenerationRequest, arrival: int, eos_ids: frozenset[int] = frozenset()) -> None:
        sampling = request.sampling
        self.request = request
        self.arrival = arrival  # order of arrival; lower goes first
        self.tokens: list[int] = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.computed = 0  # tokens whose keys and values lie in the blocks
        self.published = 0  # leading blocks already offered to the prefix cache
        self.cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None until first admitted
        self.ending = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else eos_ids)
        self.preemptions = 0
        self.status = SequenceStatus.WAITING
        self._blocks: list[int] = []
        self._block_table: tuple[int, ...] | None = ()  # None: `_blocks` grew since it was made
        self._keys: list[bytes] = []  # of the leading full blocks, as far as anyone asked
        self._past = PastTokens(request.prompt) if sampling.looks_back else None

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> None:
        """Take up a token that was sampled."""
        self.tokens.append(token)
        if self._past is not None:
            self._past.add(token)

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
            parent = self._keys[-1] if self._keys else root_key(self.request.cache_salt)
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
        self.status = status
        return blocks

    def row(self, count: int) -> RowPlan:
        """Return this sequence's share of a step: its next `count` pending tokens. Samples if they end the pending."""
        if count == self.pending == 1:  # decode, the path taken once per output token
            return self._sampling_row((self.tokens[-1],))
        end = self.computed + count
        tokens = tuple(self.tokens[self.computed : end])
        if end < len(self.tokens):
            return RowPlan(tokens, self.computed, self.block_table, sampling=None)
        return self._sampling_row(tokens)

    def _sampling_row(self, tokens: tuple[int, ...]) -> RowPlan:
        sampling = self.request.sampling
        banned = tuple(self.ending) if self.output_length < sampling.min_tokens else ()
        return RowPlan(tokens, self.computed, self.block_table, sampling, self._past, banned)
