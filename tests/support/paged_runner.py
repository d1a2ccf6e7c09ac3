"""PagedRunner: a small real runner. It computes on a paged cache, as a model does, but with hashes for arithmetic.

Each slot holds a digest of its own token, of the adapter, and of the slot before it, read through the block table, as
keys and values of a deep layer depend on every token before them. The sampled token is a digest of every slot of the
context, read back through the block table, with the sampling parameters, seed and position. A wrong block, a leak from
another sequence, a stale cache hit or a slot written too late changes the output.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import fields

import numpy as np

from engine.plan import (
    BLOCK_SIZE,
    Draw,
    Interrupted,
    Reading,
    RowPlan,
    Score,
    StepInterrupted,
    StepPlan,
    StepResult,
    never,
)
from engine.pooling import pool
from engine.request import TokenLogprob

_MASK = 2**64 - 1


def _hash_of(adapter: str) -> int:
    return int.from_bytes(hashlib.sha256(adapter.encode()).digest()[:8], "little")


class PagedRunner:
    def __init__(self, block_count: int, vocabulary_size: int = 50_000, max_rows: int | None = None) -> None:
        self.block_count = block_count
        self.vocabulary_size = vocabulary_size
        self.latest: StepPlan | None = None
        self.steps = 0
        self._max_rows = max_rows
        # Poisoned: a slot read before it was written gives another output.
        self._slots = np.random.default_rng(1).integers(0, _MASK, (block_count, BLOCK_SIZE), dtype=np.uint64)

    def run(self, plan: StepPlan, interrupted: Interrupted = never) -> StepResult:
        self.latest = plan
        self.steps += 1
        assert plan.rows
        assert self._max_rows is None or len(plan.rows) <= self._max_rows
        for row in plan.rows:
            self._write(row)
        if interrupted():  # as late as can be: everything is stored
            raise StepInterrupted
        sampled = tuple(tuple(self._sample(row, draw) for draw in row.draws) for row in plan.rows)
        return StepResult(sampled, tuple(map(self._read, plan.rows)))

    def _write(self, row: RowPlan) -> None:
        assert row.tokens
        assert len(set(row.block_table)) == len(row.block_table)
        assert len(row.block_table) * BLOCK_SIZE >= row.context_length
        state = 0 if row.start == 0 else int(self._slots[self._slot(row, row.start - 1)])
        weights = 0 if row.adapter is None else _hash_of(row.adapter)
        for position, token in enumerate(row.tokens, row.start):
            state = (state * 6364136223846793005 + (token + 1) * 1442695040888963407 + position + weights) & _MASK
            state ^= state >> 29
            self._slots[self._slot(row, position)] = state

    @staticmethod
    def _slot(row: RowPlan, position: int) -> tuple[int, int]:
        return row.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE

    def _read(self, row: RowPlan) -> Reading:
        scored = tuple(self._score(row, score) for score in row.scores)
        if row.pool is None:
            return Reading(scored)
        positions = range(row.start, row.context_length)
        states = np.array([self._slots[self._slot(row, position)] for position in positions])
        shifts = np.array([0, 16, 32, 48], dtype=np.uint64)
        hidden = ((states[:, None] >> shifts) & np.uint64(0xFFFF)).astype(np.float32)
        return Reading(scored, pool(row.pool, hidden - 32768))

    def _score(self, row: RowPlan, score: Score) -> TokenLogprob:
        context = self._slots[list(row.block_table)].reshape(-1)[: row.start + score.offset + 1]
        bits = hashlib.sha256(context.tobytes() + score.token.to_bytes(8, "little")).digest()[:2]
        logprob = struct.unpack("<f", struct.pack("<f", -(int.from_bytes(bits, "little") + 1) / 997))[0]
        top = tuple((rank, logprob - rank) for rank in range(row.sampling.prompt_logprobs or 0))
        return TokenLogprob(score.token, logprob, top)

    def _sample(self, row: RowPlan, draw: Draw) -> TokenLogprob:
        context = self._slots[list(row.block_table)].reshape(-1)[: row.position(draw)]
        drawn = _draw(context.tobytes(), row, draw)
        token = int.from_bytes(drawn[:8], "little") % self.vocabulary_size
        if draw.mask is not None:
            allowed = [token for token in range(len(draw.mask) * 8) if draw.mask[token // 8] >> token % 8 & 1]
            token = allowed[token % len(allowed)]
        while token in draw.banned:
            token = (token + 1) % self.vocabulary_size
        bits = int.from_bytes(drawn[8:10], "little")
        logprob = struct.unpack("<f", struct.pack("<f", -(bits + 1) / 997))[0]
        top = ((token + rank) % self.vocabulary_size for rank in range(row.sampling.top_logprobs))
        return TokenLogprob(token, logprob, tuple((other, logprob - rank) for rank, other in enumerate(top)))


# How long the output may get and what is reported of it does not matter to what is drawn.
_IDLE = {"max_tokens", "min_tokens", "stop", "stop_tokens", "ignore_eos", "logprobs", "top_logprobs", "prompt_logprobs"}


def _draw(context: bytes, row: RowPlan, draw: Draw) -> bytes:
    chosen = [(f.name, getattr(row.sampling, f.name)) for f in fields(row.sampling) if f.name not in _IDLE]
    past = None if draw.past is None else (sorted(draw.past.seen), sorted(draw.past.counts.items()))
    return hashlib.sha256(context + repr((chosen, past, row.position(draw))).encode()).digest()
