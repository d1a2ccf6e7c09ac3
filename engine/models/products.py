"""Where a borrowed forward pass multiplies matrices: each `F.linear` becomes the engine's, anything else ends it.

Source: torch.overrides.TorchFunctionMode, which sees what the code inside `with` asks of torch, on this thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.config import UnsupportedModel
from kernels.linear import Linear

# What multiplies matrices, or sums over tokens in an order of its own.
_NAMED: dict[str, tuple[Any, ...]] = {
    "matmul": (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
    "mm": (torch.mm, Tensor.mm, torch.addmm, Tensor.addmm),
    "bmm": (torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm),
    "einsum": (torch.einsum,),
    "conv": (torch.conv1d, F.conv1d, torch.conv2d, F.conv2d),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention,),
    "cumsum": (torch.cumsum, Tensor.cumsum),
}
_OTHERS = {function: name for name, functions in _NAMED.items() for function in functions}


class Products(TorchFunctionMode):
    """Entered around a forward pass. What runs in `ours` is the engine's own arithmetic and is let be."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear
        self._depth = 0

    @property
    def within_ours(self) -> bool:
        return self._depth > 0

    @contextmanager
    def ours(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._depth:
            return func(*args, **(kwargs or {}))
        if func is F.linear:
            return self._product(*args, **(kwargs or {}))
        if func in _OTHERS:
            raise UnsupportedModel(f"`{_OTHERS[func]}` is used outside of attention and products, and is not invariant")
        return func(*args, **(kwargs or {}))

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with self.ours():
            rows = input.reshape(-1, input.shape[-1])
            return self._linear(rows, weight, bias).view(*input.shape[:-1], weight.shape[0])
