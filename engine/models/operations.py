"""The operations of a borrowed forward pass, looked at one by one: those known to keep rows apart, and no others.

Listed are names of the library's own operations (aten). Products are missing on purpose: they are the engine's. What a
listed one does along the tokens would be found by running it, see probe.py; what is not listed is not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import UnsupportedModel
from engine.models.products import Products
from engine.models.rows import VECTORS

_MOVES = """
_local_scalar_dense _reshape_alias _to_copy _unsafe_view alias arange as_strided cat clone constant_pad_nd
copy_ detach embedding empty empty_like expand fill_ full full_like gather index index_put index_put_
index_select lift_fresh masked_fill masked_fill_ new_empty new_full new_ones new_zeros nonzero ones ones_like permute
repeat scalar_tensor scatter scatter_ select slice split split_with_sizes squeeze stack t transpose unbind
unfold unsqueeze view where zero_ zeros zeros_like
"""
_COMPARES = """
any argsort bitwise_and bitwise_not bitwise_or eq ge gt isin isinf isnan le logical_and logical_not logical_or lt ne
sort topk
"""
_ELEMENTS = """
abs add add_ clamp clamp_ clamp_max clamp_min cos div div_ erf exp floor_divide hardtanh leaky_relu log maximum minimum
mul mul_ neg pow reciprocal relu relu_ remainder rsub sin sqrt sub sub_ tanh
"""
_ROWS = """
_fused_rms_norm _log_softmax _softmax amax amin linalg_vector_norm max mean min native_layer_norm sum var
"""
_UNEVEN = "gelu mish rsqrt sigmoid silu silu_ softplus"  # see rows.py
_ALLOWED = frozenset(" ".join((_MOVES, _COMPARES, _ELEMENTS, _ROWS, _UNEVEN)).split())
_GRAIN = 32_768  # elements below which the library keeps to one thread


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered around one forward pass. Raises UnsupportedModel at the first operation that is not known."""

    def __init__(self, products: Products) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products = products

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._products.within_ours:
            return func(*args, **(kwargs or {}))
        with self:  # one made of others is looked at in its parts
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self._look(func, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _look(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        name = str(getattr(func, "overloadpacket", func)).removeprefix("aten.")
        if name not in _ALLOWED:
            raise UnsupportedModel(f"`{name}` is not known to compute each row by itself")
        threads = torch.get_num_threads()
        if name in _UNEVEN.split() and threads > 2 and isinstance(args[0], Tensor):
            width = args[0].shape[-1]
            if width * VECTORS * threads <= (threads - 1) * _GRAIN:  # fewer threads share it, and not by vectors
                raise UnsupportedModel(f"`{name}` of {width} values needs `threads` of 1 or 2 to be invariant")
