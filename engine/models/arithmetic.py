"""Arithmetic: what the layers of decoder.py are computed with. There are two, and one is chosen once, at start.

    cpu_arithmetic.py      torch on the CPU: products that the machine was found invariant for, attention by segments
    triton_arithmetic.py   kernels/ on a GPU, or in Triton's interpreter: fused where they are, no wait for the host

A step reaches the layers as its inputs, made by whoever runs the model for the arithmetic that it has: layers hand them
on and look at no more of them than `Passing` says. So no layer knows on what it runs, and no arithmetic which layers
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from kernels.low_rank import LowRank
from kernels.rope_store import HeadNorm


class Passing(Protocol):
    """One step on its way through the layers. T tokens."""

    @property
    def tokens(self) -> Tensor:
        """[T] int64"""
        ...

    def give_way(self) -> None:
        """Called between layers, and within. Raises StepInterrupted."""
        ...


Inputs = TypeVar("Inputs", bound=Passing)
Taken = TypeVar("Taken", bound=Passing, contravariant=True)  # the inputs that a model takes


@dataclass(frozen=True, slots=True)
class KVCache:
    key: Tensor  # [N + 1, P, G, D]  the last block is zero and nobody's
    value: Tensor  # [N + 1, P, G, D]


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a fine-tuning adds to the products of each layer, by the names of `product_parts`; absent: nothing."""

    layers: tuple[Mapping[str, LowRank], ...]


@dataclass(frozen=True, slots=True)
class LayerProduct:
    """A product of a layer, named as adapters name it."""

    layer: int
    name: str
    weight: Tensor  # [N, K], laid out by the arithmetic
    bias: Tensor | None = None  # [N]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosine and sine of angles, [·, D/2] float32: of every position, or of the tokens of a step."""

    cos: Tensor
    sin: Tensor


class Arithmetic(Protocol[Inputs]):
    """Every row's result depends on that row alone, in its bits, whatever is computed beside it."""

    def through(
        self,
        layers: Callable[[Inputs, Rotation, Tensor, Sequence[KVCache]], Tensor],
        inputs: Inputs,
        rotation: Rotation,
        embedded: Tensor,  # [T, H]
        caches: Sequence[KVCache],
    ) -> Tensor:  # [T, H]
        """Return what the layers make of a step. What they launch for one may be launched for others of its shape."""
        ...

    def hold(self, tensor: Tensor) -> Tensor:
        """Return a parameter where it is computed with."""
        ...

    def lay_out(self, weight: Tensor) -> Tensor:
        """Return a weight [N, K] as products want it, where they read it."""
        ...

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return x / rms(x) · weight, of [M, H]."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and x + residual."""
        ...

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x·weightᵀ; `weight` is laid out."""
        ...

    def product(self, inputs: Inputs, product: LayerProduct, x: Tensor) -> Tensor:
        """Return x·weightᵀ + bias, and of adapted rows what their adapter adds."""
        ...

    def gated_product(self, inputs: Inputs, product: LayerProduct, x: Tensor) -> Tensor:
        """Return silu(gate) · up, the halves of `product`."""
        ...

    def rotation(self, inputs: Inputs, every: Rotation) -> Rotation:
        """Return, once for all layers, what `rotate_and_store` wants of the rotation of every position."""
        ...

    def rotate_and_store(
        self,
        inputs: Inputs,
        fused: Tensor,  # [T, (H + 2G) · D]  the heads of the query, of the key, of the value
        norm: HeadNorm | None,
        rotation: Rotation,
        cache: KVCache,
    ) -> Tensor:  # [T, H, D]
        """Return the query, normed and rotated; the key, treated alike, and the value are in the step's slots then."""
        ...

    def attention(self, inputs: Inputs, query: Tensor, cache: KVCache, scale: float) -> Tensor:
        """Return the attention [T, H, D] of each token over its own sequence up to itself."""
        ...
