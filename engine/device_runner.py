"""The runner on a device: a step's plan → one copy there → layers, logits, tokens → one copy back.

    plan   rows  [a: 1 token | b: 40 tokens | c: 1 token]
    there  tokens [a | c | b b b …], positions, slots, block tables, who draws what and how
    back   tokens drawn, log-probabilities, likeliest alternatives, hidden states of what is pooled

What model_runner.py does on a CPU, by the kernels: the logits never leave the device. Sequences that compute one token
stand first in a step, whatever their order in the plan. The whole step is handed over before anything is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product, repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.looks import TIERS, Look, Looks
from engine.model_runner import CACHED_AS
from engine.models.adapter_stacks import AdapterStacks, Names
from engine.models.arithmetic import Adapter, KVCache
from engine.models.model import Model
from engine.models.triton_arithmetic import DeviceInputs, TritonArithmetic
from engine.plan import BLOCK_SIZE, Draw, Interrupted, PastTokens, Reading, RowPlan, StepPlan, StepResult, never
from engine.pooling import pool
from engine.request import Pooling, SamplingParams, TokenLogprob
from engine.transfer import Outbox, fetch
from kernels.launch import TABLE
from kernels.mixed_attention import Decodes, Mixed, Prefills

Sent = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a plan stand in its step."""

    rows: tuple[RowPlan, ...]  # in the order of the step
    firsts: tuple[int, ...]  # the first token of each row of the plan
    decodes: int  # rows, the first ones, that go by the attention of one token

    @classmethod
    def of(cls, rows: Sequence[RowPlan], decodes_apart: bool) -> Layout:
        order = sorted(range(len(rows)), key=lambda index: decodes_apart and len(rows[index].tokens) > 1)
        firsts, first = [0] * len(rows), 0
        for index in order:
            firsts[index] = first
            first += len(rows[index].tokens)
        decodes = sum(1 for row in rows if len(row.tokens) == 1) if decodes_apart else 0
        return cls(tuple(rows[index] for index in order), tuple(firsts), decodes)


class DeviceRunner:
    """`plan.Runner` on a device. One thread at a time."""

    def __init__(
        self,
        model: Model[DeviceInputs],
        arithmetic: TritonArithmetic,
        block_count: int,
        adapters: Mapping[str, Adapter] | None = None,
        kv_cache_dtype: str = "bfloat16",  # a name of CACHED_AS
    ) -> None:
        config, device = model.config, arithmetic.device
        shape = (block_count + 1, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self._model = model
        self._device = device
        self._decodes_apart = arithmetic.decodes_apart
        self._adapters = AdapterStacks(adapters or {}, device)
        self._block_count = block_count
        self.caches = [
            KVCache(*(torch.zeros(shape, dtype=CACHED_AS[kv_cache_dtype], device=device) for _ in "kv"))
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def block_count(self) -> int:
        return self._block_count

    def warm_up(self, most_rows: int) -> None:
        """Carry out steps of every kind and one of `most_rows` tokens, so that what a request may wish for is compiled
        before it comes, and memory that is too little for it is found out now.

        What is left is compiled when it is met: more than 16 biases, and products of adapters whose blocks have other
        widths. What decode keeps of segments grows with the contexts, and is not asked for here.
        What they store lies in the first block, which belongs to nobody yet, and rows write over each other's.
        """
        for plan in (*warming_steps(), *adapter_steps(self._adapters.kinds, most_rows), widest_step(most_rows)):
            self.run(plan)

    @torch.inference_mode()
    def run(self, plan: StepPlan, interrupted: Interrupted = never) -> StepResult:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: Triton launches on it
        layout, outbox = Layout.of(plan.rows, self._decodes_apart), Outbox()
        inputs = self._pack(layout, interrupted, outbox)
        looks = Looks(_looks(plan.rows, layout), self._model.config.vocab_size, outbox)
        sent = outbox.send(self._device)
        hidden = self._model.hidden(inputs(sent), self.caches)
        found = looks.carry_out(sent, hidden, self._model.logits)
        pooled = _pooled(plan.rows, layout, hidden)
        results = fetch([*found, *pooled])
        shown = looks.read(iter(results[: len(found)]))
        return _result(plan.rows, shown, results[len(found) :])

    def _pack(self, layout: Layout, interrupted: Interrupted, outbox: Outbox) -> Callable[[Sent], DeviceInputs]:
        rows = layout.rows
        counts = np.array([len(row.tokens) for row in rows])
        starts = np.concatenate(([0], np.cumsum(counts)))
        of = np.repeat(np.arange(len(rows)), counts)
        position = np.array([row.start for row in rows])[of] + np.arange(starts[-1]) - starts[of]
        table = _table(rows)
        tokens = outbox.add(np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int64, starts[-1]))
        positions = outbox.add(position)
        slots = outbox.add(table[of, position // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + position % BLOCK_SIZE)
        sequences = _pack_sequences(layout, table, starts, outbox)
        adapted = self._pack_adapters(rows, counts, outbox)

        def arrived(sent: Sent) -> DeviceInputs:
            groups = {kind: (sent[order], sent[bounds]) for kind, (order, bounds) in adapted.items()}
            return DeviceInputs(
                sent[tokens],
                sent[positions],
                sent[slots],
                sequences(sent),
                self._adapters.step(groups),
                interrupted,
            )

        return arrived

    def _pack_adapters(
        self, rows: Sequence[RowPlan], counts: npt.NDArray[np.int64], outbox: Outbox
    ) -> dict[Names, tuple[int, int]]:
        if all(row.adapter is None for row in rows):
            return {}
        names = [name for row, count in zip(rows, counts, strict=True) for name in repeat(row.adapter, int(count))]
        packed = {}
        for kind in self._adapters.kinds:
            order, bounds = self._adapters.rows_of(names, kind)
            packed[kind] = (outbox.add(order), outbox.add(bounds))
        return packed


def warming_steps() -> tuple[StepPlan, StepPlan]:
    """Return a step that draws a token for every set of wishes, and one that reads and tells of alternatives."""

    def row(start: int, tokens: int, draw: Draw, **wishes: Any) -> RowPlan:
        params = SamplingParams(max_tokens=1, seed=0, **wishes)
        return RowPlan((0,) * tokens, start, (0,), params, (draw,))

    wishes = []
    for start, (biased, penalised, masked, cut) in enumerate(product((False, True), repeat=4)):
        draw = Draw(0, PastTokens((0,)) if penalised else None, mask=b"\xff" if masked else None)
        bias = ((0, 1.0),) if biased else ()
        factor, share = 1.1 if penalised else 1.0, 0.5 if cut else 1.0
        wishes.append(row(start, 1, draw, logit_bias=bias, repetition_penalty=factor, top_p=share))
    tiers = [row(2 + at, 1, Draw(0), logprobs=True, top_logprobs=tier) for at, tier in enumerate(TIERS)]
    return StepPlan(tuple(wishes)), StepPlan((row(0, 2, Draw(1)), *tiers))


def adapter_steps(kinds: Sequence[Names], most_rows: int) -> list[StepPlan]:
    """Return a step for every launch of the adapters' kernel, which goes by the rows that one has on average."""
    averages = (1, *(entry.at_most + 1 for entry in TABLE if entry.operation == "gemm"))
    counts = [(kind, (average - 1) * len(kind) + 1) for kind in kinds for average in averages]
    draw = SamplingParams(max_tokens=1, seed=0)
    return [
        StepPlan(tuple(RowPlan((0,) * tokens, 0, (0,), draw, (Draw(0),), adapter=kind[0]) for tokens in _filled(count)))
        for kind, count in counts
        if count <= most_rows
    ]


def widest_step(most_rows: int) -> StepPlan:
    """Return a step that wishes for everything at as many tokens as there may be."""
    everything = SamplingParams(
        max_tokens=1,
        seed=0,
        logit_bias=((0, 1.0),),
        repetition_penalty=1.1,
        top_p=0.5,
        logprobs=True,
        top_logprobs=TIERS[-1],
    )
    past = PastTokens((0,))
    return StepPlan(
        tuple(
            RowPlan((0,) * tokens, 0, (0,), everything, tuple(Draw(at, past, mask=b"\xff") for at in range(tokens)))
            for tokens in _filled(most_rows)
        )
    )


def _filled(tokens: int) -> list[int]:
    """Return the tokens of rows of one block each, filled one after another."""
    return [min(BLOCK_SIZE, tokens - first) for first in range(0, tokens, BLOCK_SIZE)]


def _table(rows: Sequence[RowPlan]) -> npt.NDArray[np.int32]:
    table = np.zeros((len(rows), max(len(row.block_table) for row in rows)), dtype=np.int32)
    for at, row in enumerate(rows):
        table[at, : len(row.block_table)] = row.block_table
    return table


def _pack_sequences(
    layout: Layout, table: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], outbox: Outbox
) -> Callable[[Sent], Mixed]:
    """Each of the two kinds of sequences has a table as wide as its own longest."""
    context = np.array([row.context_length for row in layout.rows], dtype=np.int32)

    def pack(chosen: slice) -> tuple[int, int]:
        width = -(-int(context[chosen].max()) // BLOCK_SIZE)
        return outbox.add(table[chosen, :width]), outbox.add(context[chosen])

    one, more = slice(layout.decodes), slice(layout.decodes, None)
    decodes = pack(one) if layout.decodes else None
    prefills = pack(more) if layout.decodes < len(layout.rows) else None
    begins = outbox.add((starts[layout.decodes :] - starts[layout.decodes]).astype(np.int32))
    return lambda sent: Mixed(
        None if decodes is None else Decodes(sent[decodes[0]], sent[decodes[1]]),
        None if prefills is None else Prefills(sent[prefills[0]], sent[prefills[1]], sent[begins]),
    )


def _looks(rows: Sequence[RowPlan], layout: Layout) -> list[Look]:
    """Return the looks of a plan, row by row, draws before scores."""
    looks = []
    for row, first in zip(rows, layout.firsts, strict=True):
        looks += [Look(first + draw.offset, row, draw) for draw in row.draws]
        looks += [Look(first + score.offset, row, score) for score in row.scores]
    return looks


def _pooled(rows: Sequence[RowPlan], layout: Layout, hidden: Tensor) -> list[Tensor]:
    """Return the hidden states that are wanted of each row that wants some."""
    states = []
    for row, first in zip(rows, layout.firsts, strict=True):
        if row.pool is not None:
            after = first + len(row.tokens)
            states.append(hidden[after - 1 if row.pool.pooling is Pooling.LAST else first : after])
    return states


def _result(rows: Sequence[RowPlan], shown: Sequence[TokenLogprob], pooled: Sequence[Tensor]) -> StepResult:
    found, states = iter(shown), iter(pooled)
    sampled, readings = [], []
    for row in rows:
        sampled.append(tuple(next(found) for _ in row.draws))
        scored = tuple(next(found) for _ in row.scores)
        vector = pool(row.pool, next(states).float().numpy()) if row.pool is not None else None
        readings.append(Reading(scored, vector))
    return StepResult(tuple(sampled), tuple(readings))
