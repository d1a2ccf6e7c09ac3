"""A mixture of experts at the shape of Qwen3 30B-A3B, beside torch expert by expert.

    python -m tests.benchmarks.kernels.bench_experts

The bytes counted are the weights of every expert that is chosen, once, and what goes in and out between the launches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.experts import experts
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

COUNT, CHOICES, HIDDEN, INNER = 128, 8, 2048, 768
ROWS = (1, 16, 64, 256, 1024, 4096)


def by_torch(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, choice = (chosen == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        output = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, rows, output * weights[rows, choice, None].to(x.dtype))
    return out


def compare(rows: int, gate_up: Tensor, down: Tensor, ceilings: Ceilings) -> None:
    x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    chosen = torch.rand(rows, COUNT, device="cuda").argsort(dim=1)[:, :CHOICES].contiguous()
    weights = torch.rand(rows, CHOICES, device="cuda").softmax(-1)
    read = int(chosen.unique().numel()) * 3 * HIDDEN * INNER
    moved = 2 * (read + rows * (2 * HIDDEN + 2 * CHOICES * (HIDDEN + INNER)))
    operations = 6 * rows * CHOICES * HIDDEN * INNER
    ours = seconds_of(lambda: experts(x, gate_up, down, chosen, weights))
    print(ceilings.line(f"{rows} rows", ours, moved, operations))
    theirs = seconds_of(lambda: by_torch(x, gate_up, down, chosen, weights))
    print(ceilings.line(f"{rows} rows, torch expert by expert", theirs, moved, operations))


def main() -> None:
    ceilings = measure()
    print(f"{COUNT} experts, {CHOICES} chosen, hidden {HIDDEN}, inner {INNER}", flush=True)
    gate_up = torch.randn(COUNT, 2 * INNER, HIDDEN, device="cuda").bfloat16() / HIDDEN**0.5
    down = torch.randn(COUNT, HIDDEN, INNER, device="cuda").bfloat16() / INNER**0.5
    for rows in ROWS:
        compare(rows, gate_up, down, ceilings)


if __name__ == "__main__":
    main()
