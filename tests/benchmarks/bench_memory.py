"""Memory of the gateway without a model, over many requests: how much it holds, and whether it grows.

    python -m tests.benchmarks.bench_memory [--requests 10000]

The governed server of bench_gateway with a scripted engine; resident memory after each quarter. Asserts nothing.
"""

from __future__ import annotations

import argparse

from tests.benchmarks.bench_gateway import served
from tests.benchmarks.load import run_load
from tests.benchmarks.machine import describe_machine
from tests.support.tenant import MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    print(describe_machine())
    with served("governed", ["--engine", "scripted"]) as governed:
        print(f"at start: {governed.resident_mib:.0f} MiB")
        quarter = max(1, arguments.requests // 4)
        for done in range(1, 5):
            load = run_load(governed.url, governed.token_file, MODEL, 32, quarter, 32)
            print(f"after {done * quarter:>6} requests: {governed.resident_mib:.0f} MiB, {load.errors} errors")


if __name__ == "__main__":
    main()
