"""SiLU of the gate times up, at the widths of Qwen3 0.6B and 8B, beside torch's own and its compiler's.

python -m tests.benchmarks.kernels.bench_silu_mul
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.silu_mul import silu_mul_triton
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

DEVICE = "cuda"
WIDTHS = (3072, 12288)
ROWS = (1, 256, 8192)


def by_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def compare(rows: int, width: int, ceilings: Ceilings) -> None:
    gate_up = torch.randn(rows, 2 * width, device=DEVICE).bfloat16()
    compiled = torch.compile(by_torch)
    moved = 2 * 3 * rows * width
    for name, call in (
        ("ours", lambda: silu_mul_triton(gate_up)),
        ("torch", lambda: by_torch(gate_up)),
        ("torch compiled", lambda: compiled(gate_up)),
    ):
        print(ceilings.line(f"{rows} × {width}: {name}", seconds_of(call), moved))


def main() -> None:
    ceilings = measure()
    for width in WIDTHS:
        for rows in ROWS:
            compare(rows, width, ceilings)


if __name__ == "__main__":
    main()
