"""Experts chosen for every token, and their rows grouped, at the router of Qwen3 30B-A3B, beside torch's.

    python -m tests.benchmarks.kernels.bench_route

So little is moved that the time is a launch's, to be held against the products that follow: see bench_experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.grouped import group_rows
from kernels.route import route
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

COUNT, CHOICES = 128, 8
ROWS = (1, 64, 256, 2048, 8192)


def by_torch(scores: Tensor) -> tuple[Tensor, Tensor]:
    best, chosen = scores.float().topk(CHOICES, dim=-1)
    return chosen, best.softmax(-1)


def grouped_by_torch(chosen: Tensor) -> tuple[Tensor, Tensor]:
    ordered, order = torch.sort(chosen, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(COUNT + 1, device=chosen.device), out_int32=True)


def compare(rows: int, ceilings: Ceilings) -> None:
    scores = torch.randn(rows, COUNT, device="cuda").bfloat16()
    chosen = route(scores, CHOICES)[0].view(-1)
    routed, grouped = 2 * scores.numel() + 12 * chosen.numel(), 16 * chosen.numel()
    for name, call, moved in (
        ("chosen", lambda: route(scores, CHOICES), routed),
        ("chosen, torch", lambda: by_torch(scores), routed),
        ("grouped", lambda: group_rows(chosen, COUNT), grouped),
        ("grouped, torch", lambda: grouped_by_torch(chosen), grouped),
    ):
        print(ceilings.line(f"{rows} rows: {name}", seconds_of(call), moved))


def main() -> None:
    ceilings = measure()
    print(f"{COUNT} experts, {CHOICES} chosen", flush=True)
    for rows in ROWS:
        compare(rows, ceilings)


if __name__ == "__main__":
    main()
