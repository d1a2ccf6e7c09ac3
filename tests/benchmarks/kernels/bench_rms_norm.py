"""RMSNorm, alone and with the residual added, at the widths of Qwen3 0.6B and 8B, beside what torch offers.

python -m tests.benchmarks.kernels.bench_rms_norm
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

DEVICE = "cuda"
WIDTHS = (1024, 4096)
ROWS = (1, 256, 8192)
EPSILON = 1e-6


def by_torch(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    added = x + residual
    return F.rms_norm(added, weight.shape, weight, EPSILON), added


def compare(rows: int, width: int, ceilings: Ceilings) -> None:
    x, residual = (torch.randn(rows, width, device=DEVICE).bfloat16() for _ in "xr")
    weight = torch.randn(width, device=DEVICE).bfloat16()
    compiled = torch.compile(by_torch)
    once, size = 2 * x.numel(), (width,)
    for name, moved, call in (
        ("norm", 2 * once, lambda: rms_norm_triton(x, weight, EPSILON)),
        ("norm, torch", 2 * once, lambda: F.rms_norm(x, size, weight, EPSILON)),
        ("add and norm", 4 * once, lambda: add_rms_norm_triton(x, residual, weight, EPSILON)),
        ("add and norm, torch compiled", 4 * once, lambda: compiled(x, residual, weight)),
    ):
        print(ceilings.line(f"{rows} × {width}: {name}", seconds_of(call), moved))


def main() -> None:
    ceilings = measure()
    for width in WIDTHS:
        for rows in ROWS:
            compare(rows, width, ceilings)


if __name__ == "__main__":
    main()
