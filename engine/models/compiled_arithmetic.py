"""The arithmetic of a CPU that multiplies bfloat16, where numba is: compiled, and attention gathers nothing.

Products are cpu_arithmetic.py's. Blocks of a bfloat16 cache are laid out for tile_attention.py; a cache of float8 is
cpu_arithmetic.py's, too. Imported only where numba is; see compiled.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.models.arithmetic import KVCache, LayerProduct, Rotation
from engine.models.cpu_arithmetic import CpuArithmetic, Gated, StepInputs
from engine.models.decoder import DecoderConfig
from engine.models.repeated_pass import MOST_TOKENS, Layers, RepeatedPasses
from kernels import lane_rms_norm, lane_silu_mul, tile_attention, tile_rope_store
from kernels.lanes import has_pairs
from kernels.linear import Linear, Pack
from kernels.paged_attention import Segment
from kernels.rope_store import HeadNorm


class CompiledArithmetic(CpuArithmetic):
    """Whose sizes `serves` let pass."""

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return lane_rms_norm.lane_rms_norm(x, weight, epsilon)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return lane_rms_norm.lane_add_rms_norm(x, residual, weight, epsilon)

    def gated_product(self, inputs: StepInputs, product: LayerProduct, x: Tensor) -> Tensor:
        whole = None if inputs.adapted else self._gated(x, product.weight)
        return lane_silu_mul.lane_silu_mul(self.product(inputs, product, x)) if whole is None else whole

    def rotate_and_store(
        self, inputs: StepInputs, fused: Tensor, norm: HeadNorm | None, rotation: Rotation, cache: KVCache
    ) -> Tensor:
        if cache.key.dtype != torch.bfloat16:
            return super().rotate_and_store(inputs, fused, norm, rotation, cache)
        return tile_rope_store.tile_rope_store(
            fused, norm, rotation.cos, rotation.sin, inputs.slots, cache.key, cache.value
        )

    def attention(self, inputs: StepInputs, query: Tensor, cache: KVCache, scale: float) -> Tensor:
        if cache.key.dtype != torch.bfloat16:
            return super().attention(inputs, query, cache, scale)
        return tile_attention.tile_attention(
            query, cache.key, cache.value, inputs.block_table, inputs.sequences, inputs.positions, scale
        )


class CompiledThroughout(CompiledArithmetic):
    """Whose products are compiled, too: where no adapter is used, only kernels read what kernels compute."""

    def __init__(self, linear: Linear, segment: Segment, pack: Pack, gated: Gated) -> None:
        super().__init__(linear, segment, pack, gated)
        self._passes = RepeatedPasses()

    def through(
        self, layers: Layers, inputs: StepInputs, rotation: Rotation, embedded: Tensor, caches: Sequence[KVCache]
    ) -> Tensor:
        few = len(inputs.tokens) <= MOST_TOKENS
        if few and not inputs.adapted and caches[0].key.dtype == torch.bfloat16:
            return self._passes.run(layers, inputs, rotation, embedded, caches)
        return layers(inputs, rotation, embedded, caches)


def serves(config: DecoderConfig) -> bool:
    """Return whether a model's sizes are computed by the compiled kernels, and here, and invariantly."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return (
        has_pairs()
        and tile_attention.takes(heads, groups, size)
        and lane_rms_norm.takes(config.hidden_size)
        and lane_silu_mul.takes(config.intermediate_size)
        and tile_attention.verify_invariance(heads, groups, size)
        and tile_rope_store.verify_invariance(heads, groups, size)
        and lane_rms_norm.verify_invariance(config.hidden_size)
        and lane_silu_mul.verify_invariance(config.intermediate_size)
    )
