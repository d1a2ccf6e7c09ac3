"""The arithmetic of a GPU: the kernels of kernels/, by their launchers. Triton's interpreter walks through the same on
a CPU, which is how it is tested where there is no GPU.

Products are chosen by shape (device.py): our own for few rows and the library's for more, or our own for all; where the
matrix units do not agree at every height of a tile, our own in tiles of one size, which is slow and alike by
construction. Whether sequences of one token are told apart in attention was chosen with them.

A step may be given up between layers here as well: what was handed to the device by then is computed still, and what it
stored is stored again by the step that comes after it on the same stream. Once the last layer is handed over nothing is
asked any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.adapter_stacks import StepAdapters
from engine.models.arithmetic import KVCache, LayerProduct, Rotation
from engine.plan import Interrupted, StepInterrupted, never
from kernels.gemm import gemm, gemm_one_tile, gemm_silu_mul, gemm_silu_mul_one_tile
from kernels.linear import Linear, linear_by_rows, silu_mul_by_rows
from kernels.low_rank import add_low_rank_batch_triton
from kernels.mixed_attention import Mixed, mixed_attention
from kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
from kernels.rope_store import HeadNorm, rope_store_triton
from kernels.silu_mul import silu_mul_triton

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class DeviceProduct:
    """A way to multiply by a weight, and to multiply and gate."""

    multiply: Linear
    gate: Callable[[Tensor, Tensor], Tensor]


PRODUCTS = {  # the faster first
    "by_rows": DeviceProduct(linear_by_rows, silu_mul_by_rows),
    "triton": DeviceProduct(gemm, gemm_silu_mul),
    "triton_one_tile": DeviceProduct(gemm_one_tile, gemm_silu_mul_one_tile),
}


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """The tensors of one step, on its device. T tokens: those of sequences that compute one stand first."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64  where each token's key and value go
    sequences: Mixed
    adapters: StepAdapters
    interrupted: Interrupted = never

    def give_way(self) -> None:
        """Between layers, and within. Raises StepInterrupted."""
        if self.interrupted():
            raise StepInterrupted


class TritonArithmetic:
    def __init__(
        self,
        device: torch.device,
        products: Mapping[Shape, str],  # of every weight (N, K), by name
        decodes_apart: bool,  # whether sequences of one token go by the kernel for them
    ) -> None:
        self.device = device
        self.decodes_apart = decodes_apart
        self._products = {shape: PRODUCTS[name] for shape, name in products.items()}

    def through(
        self,
        layers: Callable[[DeviceInputs, Rotation, Tensor, Sequence[KVCache]], Tensor],
        inputs: DeviceInputs,
        rotation: Rotation,
        embedded: Tensor,
        caches: Sequence[KVCache],
    ) -> Tensor:
        return layers(inputs, rotation, embedded, caches)

    def hold(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).contiguous()

    def lay_out(self, weight: Tensor) -> Tensor:
        return self.hold(weight)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return rms_norm_triton(x, weight, epsilon)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm_triton(x, residual, weight, epsilon)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._of(weight).multiply(x, weight, None)

    def product(self, inputs: DeviceInputs, product: LayerProduct, x: Tensor) -> Tensor:
        result = self._of(product.weight).multiply(x, product.weight, product.bias)
        added = inputs.adapters.of(product.layer, product.name)
        if added is not None:
            add_low_rank_batch_triton(result, x, *added)
        return result

    def gated_product(self, inputs: DeviceInputs, product: LayerProduct, x: Tensor) -> Tensor:
        """What adapters add comes before the gate; without any it is opened on the way out, to the same bits."""
        if inputs.adapters.of(product.layer, product.name) is not None:
            return silu_mul_triton(self.product(inputs, product, x))
        return self._of(product.weight).gate(x, product.weight)

    def rotation(self, inputs: DeviceInputs, every: Rotation) -> Rotation:
        """Return the rotation of every position: the kernel finds its own."""
        return every

    def rotate_and_store(
        self, inputs: DeviceInputs, fused: Tensor, norm: HeadNorm | None, rotation: Rotation, cache: KVCache
    ) -> Tensor:
        return rope_store_triton(
            fused, norm, rotation.cos, rotation.sin, inputs.positions, inputs.slots, cache.key, cache.value
        )

    def attention(self, inputs: DeviceInputs, query: Tensor, cache: KVCache, scale: float) -> Tensor:
        return mixed_attention(query, cache.key, cache.value, inputs.sequences, scale)

    def _of(self, weight: Tensor) -> DeviceProduct:
        rows, columns = weight.shape
        return self._products[rows, columns]
