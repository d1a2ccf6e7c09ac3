"""The model runner of a CPU: a step's plan → tensors → logits → sampled tokens. Knows rows, not requests.

Owns the paged cache. What it computes for a row depends on that row alone: the kernels keep it, `verify_invariance`
checks the machine for it at start, and where the library's product does not keep it a slower one takes its place and
stands in the numeric policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import KV_CACHE_DTYPES, EngineStartError
from engine.logprobs import log_softmax, token_logprob
from engine.models.arithmetic import Adapter, KVCache
from engine.models.compiled import compiled_products
from engine.models.cpu_arithmetic import Adapted, Gated, Plans, StepInputs
from engine.models.decoder import DecoderConfig
from engine.models.model import Model, ModelShape
from engine.plan import BLOCK_SIZE, Draw, Interrupted, Reading, RowPlan, StepPlan, StepResult, never
from engine.pooling import pool
from engine.request import TokenLogprob
from engine.sampler import sample
from kernels import paged_attention
from kernels.attention_plan import AttentionPlan, plan_attention
from kernels.float8 import FLOAT8
from kernels.linear import TILE_M, Linear, Pack, keep, linear, linear_fixed_tiles, verify_invariance
from kernels.packed_linear import (
    pack_for_any,
    pack_for_tiles,
    packed_linear,
    packed_linear_pieces,
    packed_linear_tiles,
    packs,
)
from kernels.paged_attention import SEGMENTS

Floats = npt.NDArray[np.float32]
CACHED_AS = dict(zip(KV_CACHE_DTYPES, (torch.bfloat16, FLOAT8), strict=True))  # by the name of the setting


class InvarianceUnavailable(EngineStartError):
    """No product, or no attention, of this machine gives a row the same bits among any neighbours."""


@dataclass(frozen=True, slots=True)
class Product:
    """A way to multiply by a weight, and how the weight is laid out for it."""

    multiply: Linear
    pack: Pack = keep
    gated: Gated | None = None


LINEARS = {"library": Product(linear), "fixed_tiles": Product(linear_fixed_tiles)}  # the faster first
PACKED = {
    "packed": Product(packed_linear, pack_for_any),
    "packed_pieces": Product(packed_linear_pieces, pack_for_any),
    "packed_32_pieces": Product(packed_linear_pieces, pack_for_tiles),
    "packed_tiles": Product(packed_linear_tiles, pack_for_tiles),
}
Shape = tuple[int, int]


def products_here(compiled: bool = True) -> dict[str, Product]:
    """Return the products of this machine by name, the faster first; unless `compiled`, none that numba compiles."""
    found = compiled_products() if compiled else {}
    fastest = {name: Product(*product) for name, product in found.items()}
    return {**fastest, **(PACKED if packs(torch.bfloat16) else {}), **LINEARS}


def choose_linears(
    config: DecoderConfig, most_rows: int, products: Mapping[str, Product] | None = None
) -> dict[Shape, str]:
    """Return, for every weight shape (N, K) of the model, the name of the fastest product that is invariant here.

    Raises:
        InvarianceUnavailable: for one of the shapes none is.
    """
    products = products_here() if products is None else products
    biased = (sum(config.qkv_sizes), config.hidden_size) if config.qkv_bias else None
    return {
        shape: choose_linear(shape, most_rows, products, biased=shape == biased)
        for shape in sorted(set(config.linear_shapes()))
    }


def choose_linear(
    shape: Shape,
    most_rows: int,
    products: Mapping[str, Product] = LINEARS,
    dtype: torch.dtype = torch.bfloat16,
    biased: bool = False,  # whether a bias is added to some of its products
) -> str:
    """Return the name of the fastest product that is invariant here for a weight. Raises InvarianceUnavailable."""
    for name, product in products.items():
        uses = [product.multiply, *([_with_bias(product.multiply, shape[0], dtype)] if biased else [])]
        if all(verify_invariance(use, shape, dtype, most_rows, pack=product.pack) for use in uses):
            return name
    raise InvarianceUnavailable("no matrix product of this machine is invariant; answers could not be replayed")


def _with_bias(multiply: Linear, width: int, dtype: torch.dtype) -> Linear:
    bias = torch.randn(width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return lambda x, weight, _: multiply(x, weight, bias)


def choose_segment(config: ModelShape) -> str:
    """Return the name of the fastest segment attention that is invariant here for the model's heads.

    Raises:
        InvarianceUnavailable: none is.
    """
    for name, segment in SEGMENTS.items():
        if paged_attention.verify_invariance(segment, config.num_key_value_heads, config.head_dim, torch.bfloat16):
            return name
    raise InvarianceUnavailable("no attention of this machine is invariant; answers could not be replayed")


def verify_adapters(adapters: Iterable[Adapter]) -> None:
    """Return if what adapters add to a row is invariant here.

    Raises:
        InvarianceUnavailable: for one of their shapes it is not.
    """
    factors = {
        factor for one in adapters for layer in one.layers for low in layer.values() for factor in (low.down, low.up)
    }
    for rows, columns in sorted({(factor.shape[0], factor.shape[1]) for factor in factors}):
        if not verify_invariance(linear_fixed_tiles, (rows, columns), torch.bfloat16, 2 * TILE_M + 1):
            raise InvarianceUnavailable("no adapter is invariant on this machine; start without `adapters`")


class LinearByShape:
    """A `kernels.linear.Linear` that takes each weight to the product chosen for its shape."""

    def __init__(self, chosen: Mapping[Shape, str]) -> None:
        products = products_here()
        self._by_shape = {shape: products[name] for shape, name in chosen.items()}

    def pack(self, weight: Tensor) -> Tensor:
        """Return a weight laid out for its product."""
        rows, columns = weight.shape
        return self._by_shape[rows, columns].pack(weight)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = weight.shape
        return self._by_shape[rows, columns].multiply(x, weight, bias)

    def gated(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """Return silu(gate) · up of a weight of both, where its product does that at once."""
        rows, columns = weight.shape
        at_once = self._by_shape[rows, columns].gated
        return None if at_once is None else at_once(x, weight)


class LinearAsMet:
    """A `kernels.linear.Linear` that chooses when it meets a shape first: whose shapes are known only by running."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self.chosen: dict[tuple[Shape, torch.dtype], str] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = weight.shape
        met = ((rows, columns), weight.dtype)
        if met not in self.chosen:
            self.chosen[met] = choose_linear(met[0], self._most_rows, dtype=weight.dtype)
        return LINEARS[self.chosen[met]].multiply(x, weight, bias)


class ModelRunner:
    """`plan.Runner` on a model. One thread at a time."""

    def __init__(
        self,
        model: Model[StepInputs],
        block_count: int,
        adapters: Mapping[str, Adapter] | None = None,
        kv_cache_dtype: str = "bfloat16",  # a name of CACHED_AS
    ) -> None:
        config = model.config
        shape = (block_count + 1, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self._model = model
        self._adapters = adapters or {}
        self._block_count = block_count
        self.caches = [
            KVCache(*(torch.zeros(shape, dtype=CACHED_AS[kv_cache_dtype]) for _ in "kv"))
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def block_count(self) -> int:
        return self._block_count

    @torch.inference_mode()
    def run(self, plan: StepPlan, interrupted: Interrupted = never) -> StepResult:
        hidden = self._model.hidden(self.inputs(plan.rows, interrupted), self.caches)
        logits = self._model.logits(hidden[_looked_at(plan.rows)])
        return StepResult(*_look(plan.rows, logits, hidden))

    def inputs(self, rows: Sequence[RowPlan], interrupted: Interrupted = never) -> StepInputs:
        blocks = np.zeros((len(rows), max(len(row.block_table) for row in rows)), dtype=np.int64)
        for index, row in enumerate(rows):
            blocks[index, : len(row.block_table)] = row.block_table
        lengths = [len(row.tokens) for row in rows]
        of_row = np.repeat(np.arange(len(rows), dtype=np.int64), lengths)
        at = _integers(row.start + offset for row in rows for offset in range(len(row.tokens)))
        slots = blocks[of_row, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        table, sequence, positions = (torch.from_numpy(one) for one in (blocks, of_row, at))
        return StepInputs(
            tokens=torch.from_numpy(_integers(token for row in rows for token in row.tokens)),
            positions=positions,
            slots=torch.from_numpy(slots),
            block_table=table,
            sequences=sequence,
            plans=Plans(self._model.config.windows, partial(self._attention, table, sequence, positions)),
            adapted=self._adapted(rows),
            interrupted=interrupted,
        )

    def _attention(self, table: Tensor, sequence: Tensor, positions: Tensor, window: int | None) -> AttentionPlan:
        config = self._model.config
        return plan_attention(
            table,
            sequence,
            positions,
            config.num_attention_heads,
            config.num_key_value_heads,
            BLOCK_SIZE,
            zero_slot=self._block_count * BLOCK_SIZE,
            window=window,
        )

    def _adapted(self, rows: Sequence[RowPlan]) -> tuple[Adapted, ...]:
        """Return which tokens of the step are computed with which adapter."""
        names = {row.adapter for row in rows}
        if names == {None}:
            return ()
        if len(names) == 1:
            return tuple(Adapted(self._adapters[name], None) for name in names if name is not None)
        tokens: dict[str, list[int]] = {}
        first = 0
        for row in rows:
            if row.adapter is not None:
                tokens.setdefault(row.adapter, []).extend(range(first, first + len(row.tokens)))
            first += len(row.tokens)
        return tuple(Adapted(self._adapters[name], torch.tensor(indices)) for name, indices in tokens.items())


def _integers(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64)


def _looked_at(rows: Sequence[RowPlan]) -> Tensor:
    """Return after which of the step's tokens the vocabulary is looked at, [R]: row by row, draws before scores."""
    first, indices = 0, []
    for row in rows:
        indices += [first + draw.offset for draw in row.draws] + [first + score.offset for score in row.scores]
        first += len(row.tokens)
    return torch.tensor(indices, dtype=torch.int64)


def _look(
    rows: Sequence[RowPlan], logits: Tensor, hidden: Tensor
) -> tuple[tuple[tuple[TokenLogprob, ...], ...], tuple[Reading, ...]]:
    """Return what was sampled and what was read of every row, from the logits [R, V] and the hidden states [T, H]."""
    logprobs = log_softmax(logits).numpy()
    scores = logits.numpy()
    at = iter(range(len(logits)))
    sampled, readings, first = [], [], 0
    for row in rows:
        sampled.append(tuple(_draw(row, draw, scores, logprobs, next(at)) for draw in row.draws))
        alternatives = row.sampling.prompt_logprobs or 0
        scored = tuple(token_logprob(logprobs[next(at)], score.token, alternatives) for score in row.scores)
        pooled = None
        if row.pool is not None:
            pooled = pool(row.pool, hidden[first : first + len(row.tokens)].float().numpy())
        readings.append(Reading(scored, pooled))
        first += len(row.tokens)
    return tuple(sampled), tuple(readings)


def _draw(row: RowPlan, draw: Draw, scores: Floats, logprobs: Floats, index: int) -> TokenLogprob:
    params = row.sampling
    token = sample(scores[index], params, row.position(draw), draw)
    return token_logprob(logprobs[index], token, params.top_logprobs if params.logprobs else 0)


def blocks_in(mebibytes: int, config: ModelShape, kv_cache_dtype: str = "bfloat16") -> int:
    """Return how many KV blocks of all layers fit into that much memory, at least one."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return max(1, (mebibytes << 20) // (per_token * CACHED_AS[kv_cache_dtype].itemsize * BLOCK_SIZE))
