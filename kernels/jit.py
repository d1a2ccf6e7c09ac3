"""Triton where there is one, and the little that every kernel of ours shares.

A kernel is compiled for the GPU its tensors lie on. Where `TRITON_INTERPRET=1` stood in the environment before this
module was imported, Triton's interpreter walks through it instead, on the CPU and program by program: that proves
indexing and order, not the arithmetic of a GPU, and races never show. Its bfloat16 is wrong (it computes on raw bits,
and a carry out of the mantissa is lost when it rounds), so that kernels widen after every load and round by `narrow`.

Where there is no Triton, as on systems that are not Linux, the plain versions are all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources
except ImportError:
    triton = tl = None

    class OutOfResources(Exception):  # type: ignore[no-redef]
        """A kernel asks for more than a multiprocessor has."""


__all__ = ["INTERPRETED", "Block", "OutOfResources", "Pointer", "Scalar", "jit", "narrow", "product", "tl"]

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

# Arguments that change from step to step: compiled for no value of theirs, nor for what divides it.
VARYING = ("rows", "tokens", "sequences", "table_width", "segments", "window", "tiles", "spare_slot")

if TYPE_CHECKING or triton is None:
    Pointer = Any  # to the first element of a contiguous tensor; the comment gives its shape and dtype
    Block = Any  # a tensor inside a kernel
    Scalar = Any  # a number, or None: `int` and `float` would have the launcher take None for one, too
else:
    Pointer = Block = Scalar = tl.tensor  # the compiler looks annotations up and lets pass what is its own


def jit(function: Callable[..., Any]) -> Any:
    """Return `function` as a Triton kernel, or as it is where there is no Triton: it is never called there."""
    return function if triton is None else triton.jit(function, do_not_specialize=VARYING)


@jit
def narrow(x: Block, dtype: tl.constexpr, PLAIN: tl.constexpr) -> Block:
    """Return float32 rounded to the nearest `dtype`, ties to even; `PLAIN` where the interpreter walks."""
    if PLAIN and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, even & 0xFFFF0000, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def product(left: Block, right: Block, add: Block, PLAIN: tl.constexpr) -> Block:
    """Return left·right + add in float32. Both hold bfloat16 or float16; `PLAIN` where the interpreter walks.

    It walks in float64 and rounds: numpy's order in float32 may follow the height of a tile, which is not ours.
    """
    if PLAIN:
        wide = tl.dot(left.to(tl.float64), right.to(tl.float64), add.to(tl.float64), out_dtype=tl.float64)
        return wide.to(tl.float32)
    return tl.dot(left, right, add)
