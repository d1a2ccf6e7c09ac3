"""A step's inputs, and what it leaves behind, on the device: a decode step, and a prompt beside it.

    python -m tests.benchmarks.kernels.bench_prepare

So little is moved that the time is a launch's, to be held against a whole step. Beside it stand the same inputs copied
from the host, as three tensors.
"""

from __future__ import annotations

import torch

from kernels.prepare import SequenceTables, Step, advance, prepare
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

MOST, WIDTH, PAGE, VOCABULARY = 8192, 512, 16, 151_936


def compare(counts: list[int], ceilings: Ceilings) -> None:
    rows, count = len(counts), sum(counts)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device="cuda")

    table = torch.arange(rows * WIDTH, device="cuda").int().view(rows, WIDTH)
    tables = SequenceTables(zeros(rows, MOST), zeros(rows) + 1024, zeros(rows), table, zeros(rows, VOCABULARY))
    sequence = torch.arange(rows, device="cuda").int()
    step = Step(sequence, torch.tensor([0, *counts]).cumsum(0).int().cuda())
    still = Step(sequence, zeros(rows + 1))  # advances nothing, so that repetitions stay within the tables
    drawn, host = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.zeros(3, count, dtype=torch.int64)
    pinned = [one.pin_memory() for one in host]
    moved = 4 * count * (1 + 1) + 3 * 8 * count
    name = f"{rows} sequences, {count} tokens"
    prepared = seconds_of(lambda: prepare(tables, step, count, PAGE, 0))
    print(ceilings.line(f"{name}: inputs", prepared, moved))
    print(ceilings.line(f"{name}: advance", seconds_of(lambda: advance(tables, still, sequence, drawn)), 40 * rows))
    copied = seconds_of(lambda: [one.to("cuda", non_blocking=True) for one in pinned])
    print(ceilings.line(f"{name}: three copies from the host", copied, 2 * 3 * 8 * count))


def main() -> None:
    ceilings = measure()
    for counts in ([1], [1] * 256, [1] * 255 + [8192 - 255]):
        compare(counts, ceilings)


if __name__ == "__main__":
    main()
