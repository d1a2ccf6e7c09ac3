"""What the GPU at hand reaches at most, measured in the same run as what is held against it.

Knows no kernel of ours. Times are medians between device events; before each repetition the cache is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

COPIED = 4 << 30  # bytes read, and as many written
SQUARE = 8192  # rows and columns of the largest matrix product


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy: float  # bytes/s, read and written together
    matrix: float  # bfloat16 operations/s

    def line(self, name: str, seconds: float, moved: int, operations: int = 0) -> str:
        """Return a row of the table: the time, and what was reached of either ceiling."""
        parts = [f"{name:44} {seconds * 1e6:9.1f} µs  {moved / seconds / 1e9:7.0f} GB/s"]
        parts.append(f"{moved / seconds / self.copy:5.0%} of copy")
        if operations:
            parts.append(
                f"{operations / seconds / 1e12:6.1f} TFLOP/s {operations / seconds / self.matrix:5.0%} of matmul"
            )
        return "  ".join(parts)


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) / 1e3


def measure() -> Ceilings:
    """Measure both ceilings, print them and the machine.

    Raises:
        SystemExit: there is no GPU, and nothing to be measured.
    """
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured")
    source = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * COPIED / seconds_of(lambda: target.copy_(source))
    left, right = (torch.randn(SQUARE, SQUARE, device="cuda").bfloat16() for _ in "lr")
    matrix = 2 * SQUARE**3 / seconds_of(lambda: left @ right)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"ceilings: copy {copy / 1e9:,.0f} GB/s, matmul {matrix / 1e12:,.0f} TFLOP/s", flush=True)
    return Ceilings(copy, matrix)
