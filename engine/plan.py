"""The one hand-off of a step: what to compute (`StepPlan`) and what came of it (`StepResult`).

Plain numbers only. The scheduler, which makes plans, knows no tensors; the model runner, which carries them out, knows
no requests: `row` is all it hands back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.request import Pooling, SamplingParams, TokenLogprob

BLOCK_SIZE = 16  # tokens per KV block


class PastTokens:
    """The tokens before a position, as penalties look at them. Grows with the output; never shrinks."""

    __slots__ = ("counts", "prompt")

    def __init__(self, prompt: Iterable[int]) -> None:
        self.prompt = frozenset(prompt)
        self.counts: dict[int, int] = {}  # token id → times in the output

    @property
    def seen(self) -> frozenset[int]:
        """Tokens of prompt or output."""
        return self.prompt.union(self.counts)

    def add(self, token: int) -> None:
        self.counts[token] = self.counts.get(token, 0) + 1

    def copy(self) -> PastTokens:
        """Cost: the output's tokens; the prompt is shared."""
        copied = PastTokens(self.prompt)
        copied.counts = dict(self.counts)
        return copied


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be sampled: the one that follows the row's token at `offset`."""

    offset: int  # into `RowPlan.tokens`
    past: PastTokens | None = None  # where `sampling.looks_back`: what stands before the token to be sampled
    banned: tuple[int, ...] = ()  # ids that must not be sampled here
    mask: bytes | None = None  # of a grammar: one bit an id, the lowest first; only what is set may be sampled


@dataclass(frozen=True, slots=True)
class Score:
    """A token of the prompt whose log-probability is wanted: the one that follows the row's token at `offset`."""

    offset: int
    token: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Hidden states of the row that are wanted: of its last token, or added up over all of them."""

    pooling: Pooling
    before: bytes | None  # MEAN: the sums of the tokens before the row, [hidden size] float64; None: there are none


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One sequence's share of a step: compute `tokens` at positions `start` … `start + len(tokens) − 1`.

    The keys and values of positions below `start` already lie in the blocks of `block_table`; those of `tokens` are
    written there by this step. `len(block_table) * BLOCK_SIZE ≥ start + len(tokens)`.
    """

    tokens: tuple[int, ...]  # at least one
    start: int
    block_table: tuple[int, ...]
    sampling: SamplingParams
    draws: tuple[Draw, ...]  # by offset; none: a chunk of a prompt; one: its end, or a decode; many: a forced output
    scores: tuple[Score, ...] = ()  # by offset
    pool: Pool | None = None
    adapter: str | None = None  # by name; None: the base model alone

    def position(self, draw: Draw) -> int:
        """Return the absolute position of the token to be sampled: its noise is of (seed, position)."""
        return self.start + draw.offset + 1

    @property
    def context_length(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    rows: tuple[RowPlan, ...]  # at least one

    @property
    def token_count(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a row showed of the text it read."""

    scored: tuple[TokenLogprob, ...] = ()  # one for each of its scores
    pooled: bytes | None = None  # as its pool asks, [hidden size] float64, little-endian


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled[i]` belongs to `plan.rows[i]`: a token for each of its draws. So does `readings[i]`; where no row of the
    plan has scores or a pool, there need be none."""

    sampled: tuple[tuple[TokenLogprob, ...], ...]
    readings: tuple[Reading, ...] = ()


Interrupted = Callable[[], bool]


def never() -> bool:
    return False


class StepInterrupted(Exception):
    """A step was given up between two layers, as was asked. It sampled nothing; what it stored is stored again."""


class Runner(Protocol):
    """Carries out a plan. Ours is `ModelRunner`; the scheduler's tests use one that computes on the paged cache
    without a model."""

    @property
    def block_count(self) -> int:
        """KV blocks available, ids 0 … block_count − 1."""
        ...

    def run(self, plan: StepPlan, interrupted: Interrupted = never) -> StepResult:
        """Carry out a plan. `interrupted` may be asked between layers.

        Raises:
            StepInterrupted: it said so.
        """
        ...
