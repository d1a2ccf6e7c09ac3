"""The sampler at the vocabulary of Qwen3, by what rows ask for, beside what torch offers for a batch.

    python -m tests.benchmarks.kernels.bench_sample

The bytes counted are the logits, read once: what a search reads again shows as a lower rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sample import Cuts, SamplingTables, sample
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

VOCABULARY = 151_936
ROWS = (1, 16, 64, 256)
WISHES = {  # top-k, top-p, min-p
    "the likeliest": None,
    "temperature alone": None,
    "top-k 20": (20, 1.0, 0.0),
    "top-p 0.95": (0, 0.95, 0.0),
    "top-k 20, top-p 0.95": (20, 0.95, 0.0),
    "min-p 0.05": (0, 1.0, 0.05),
}


def tables(rows: int, wish: str) -> SamplingTables:
    def column(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    asked = WISHES[wish]
    cuts = None if asked is None else Cuts(column(asked[0], torch.int32), column(asked[1]), column(asked[2]))
    heat = 0.0 if wish == "the likeliest" else 0.8
    return SamplingTables(column(heat), torch.arange(rows, device="cuda"), cuts=cuts)


def by_torch(logits: Tensor) -> Tensor:
    """Top-p 0.95 by a sort, as it is usually written."""
    weights, order = torch.softmax(logits / 0.8, dim=-1).sort(dim=-1, descending=True)
    weights[weights.cumsum(-1) - weights > 0.95] = 0
    return order.gather(1, torch.multinomial(weights, 1))


def compare(rows: int, ceilings: Ceilings) -> None:
    logits = torch.randn(rows, VOCABULARY, device="cuda") * 3
    request = torch.arange(rows, dtype=torch.int32, device="cuda")
    position = torch.full((rows,), 1000, device="cuda")
    moved = 4 * logits.numel()
    for wish in WISHES:
        chosen = tables(rows, wish)
        taken = seconds_of(lambda: sample(logits, request, position, chosen))  # noqa: B023 - called at once
        print(ceilings.line(f"{rows} rows, {wish}", taken, moved))
    print(ceilings.line(f"{rows} rows, torch: argmax", seconds_of(lambda: logits.argmax(-1)), moved))
    print(ceilings.line(f"{rows} rows, torch: sort for top-p 0.95", seconds_of(lambda: by_torch(logits)), moved))


def main() -> None:
    ceilings = measure()
    for rows in ROWS:
        compare(rows, ceilings)


if __name__ == "__main__":
    main()
