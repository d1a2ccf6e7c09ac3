"""Log-probabilities at the vocabulary of Qwen3, beside torch's log-softmax and top-k.

    python -m tests.benchmarks.kernels.bench_logprobs

The bytes counted are the logits, read once.
"""

from __future__ import annotations

import torch

from kernels.logprobs import logprobs
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

VOCABULARY = 151_936
ROWS = (1, 16, 64, 256, 1024)


def compare(rows: int, ceilings: Ceilings) -> None:
    logits = torch.randn(rows, VOCABULARY, device="cuda") * 3
    tokens = torch.randint(VOCABULARY, (rows,), device="cuda")
    moved = 4 * logits.numel()
    for count in (0, 5, 20):
        taken = seconds_of(lambda: logprobs(logits, tokens, count))  # noqa: B023 - called at once
        print(ceilings.line(f"{rows} rows, {count} likeliest", taken, moved))
    taken = seconds_of(lambda: torch.log_softmax(logits, -1).gather(1, tokens[:, None]))
    print(ceilings.line(f"{rows} rows, torch: log-softmax", taken, moved))
    taken = seconds_of(lambda: torch.log_softmax(logits, -1).topk(20))
    print(ceilings.line(f"{rows} rows, torch: log-softmax, top 20", taken, moved))


def main() -> None:
    ceilings = measure()
    for rows in ROWS:
        compare(rows, ceilings)


if __name__ == "__main__":
    main()
