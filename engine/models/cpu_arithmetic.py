"""The arithmetic of a CPU: torch's products as they were found invariant here, and attention by segments.

`linear` is of a shape's own choosing (model_runner.py), and so is the segment's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.arithmetic import Adapter, KVCache, LayerProduct, Rotation
from engine.plan import Interrupted, StepInterrupted, never
from kernels.attention_plan import AttentionPlan
from kernels.linear import Linear, Pack, keep
from kernels.low_rank import add_low_rank
from kernels.paged_attention import Segment, paged_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope_store import HeadNorm, rope, store_kv
from kernels.silu_mul import silu_mul

Gated = Callable[[Tensor, Tensor], Tensor | None]  # x, the weights of gate and up → silu(gate) · up, or None: not here


@dataclass(frozen=True, slots=True)
class Adapted:
    """Tokens of a step that are computed with an adapter."""

    adapter: Adapter
    rows: Tensor | None  # [M] int64, which of the step's T tokens; None: all of them


class Plans(Mapping[int | None, AttentionPlan]):
    """The attention plans of a step by sliding window, None for none; each is worked out when it is first wanted."""

    def __init__(self, windows: tuple[int, ...], plan: Callable[[int | None], AttentionPlan]) -> None:
        self._windows: tuple[int | None, ...] = (None, *windows)
        self._plan = plan
        self._made: dict[int | None, AttentionPlan] = {}

    def __getitem__(self, window: int | None) -> AttentionPlan:
        if window not in self._made:
            if window not in self._windows:
                raise KeyError(window)
            self._made[window] = self._plan(window)
        return self._made[window]

    def __contains__(self, window: object) -> bool:
        return window in self._windows

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._windows)

    def __len__(self) -> int:
        return len(self._windows)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tensors of one step. T tokens."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64  where each token's key and value go
    block_table: Tensor  # [S, M] int64  of each sequence
    sequences: Tensor  # [T] int64  of which of them each token is
    plans: Mapping[int | None, AttentionPlan]  # by sliding window
    adapted: tuple[Adapted, ...] = ()  # no token is in two of them
    interrupted: Interrupted = never

    def give_way(self) -> None:
        """Between layers, and within. Raises StepInterrupted."""
        if self.interrupted():
            raise StepInterrupted


class CpuArithmetic:
    def __init__(
        self,
        linear: Linear,
        segment: Segment,
        pack: Pack = keep,  # lays a weight out for `linear`
        gated: Gated = lambda x, weight: None,
    ) -> None:
        self._linear = linear
        self._segment = segment
        self._pack = pack
        self._gated = gated

    def through(
        self,
        layers: Callable[[StepInputs, Rotation, Tensor, Sequence[KVCache]], Tensor],
        inputs: StepInputs,
        rotation: Rotation,
        embedded: Tensor,
        caches: Sequence[KVCache],
    ) -> Tensor:
        return layers(inputs, rotation, embedded, caches)

    def hold(self, tensor: Tensor) -> Tensor:
        return tensor

    def lay_out(self, weight: Tensor) -> Tensor:
        return self._pack(weight)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return rms_norm(x, weight, epsilon)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, epsilon)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._linear(x, weight, None)

    def product(self, inputs: StepInputs, product: LayerProduct, x: Tensor) -> Tensor:
        result = self._linear(x, product.weight, product.bias)
        for one in inputs.adapted:
            added = one.adapter.layers[product.layer].get(product.name)
            if added is not None:
                add_low_rank(result, x, one.rows, added)
        return result

    def gated_product(self, inputs: StepInputs, product: LayerProduct, x: Tensor) -> Tensor:
        return silu_mul(self.product(inputs, product, x))

    def rotation(self, inputs: StepInputs, every: Rotation) -> Rotation:
        """Return the rotation of the step's tokens."""
        return Rotation(every.cos[inputs.positions], every.sin[inputs.positions])

    def rotate_and_store(
        self, inputs: StepInputs, fused: Tensor, norm: HeadNorm | None, rotation: Rotation, cache: KVCache
    ) -> Tensor:
        groups, size = cache.key.shape[2:]
        heads = fused.view(fused.shape[0], -1, size)
        turned, value = torch.split(heads, [heads.shape[1] - groups, groups], dim=1)
        if norm is not None:
            query, key = torch.split(turned, [turned.shape[1] - groups, groups], dim=1)
            turned = torch.cat(
                (rms_norm(query, norm.query, norm.epsilon), rms_norm(key, norm.key, norm.epsilon)), dim=1
            )
        turned = rope(turned, rotation.cos, rotation.sin)  # both at once: for a few rows every call counts
        query, key = torch.split(turned, [turned.shape[1] - groups, groups], dim=1)
        store_kv(key, value, cache.key, cache.value, inputs.slots)
        return query

    def attention(self, inputs: StepInputs, query: Tensor, cache: KVCache, scale: float) -> Tensor:
        return paged_attention(query, cache.key, cache.value, inputs.plans[None], scale, self._segment)
