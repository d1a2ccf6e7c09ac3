"""What putting a request on record costs: `python -m tests.benchmarks.bench_audit [SECONDS]`.

A request is two leaves (received, completed) with content sealed. Throughput and latency of 1, 8, 32 and 128 callers at
a time, on SQLite and on the bundled PostgreSQL; the CPU seconds of the whole process per request; one fsync on this
disk; and the same with every commit of the log delayed by 1 ms, as on a disk of a data centre. Asserts nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import event

from audit.log import AuditLog
from tests.benchmarks.machine import fsync_s
from tests.support.audit_log import LogPlace, completed, embedded_place, received, request_id, server_place
from tests.support.postgres import PostgresServer

CALLERS = (1, 8, 32, 128)
DELAY_S = 0.001  # of an injected fsync
_numbers = itertools.count()


def main(seconds: float) -> None:
    print(f"machine: {_machine()}; {os.cpu_count()} CPUs; Python {platform.python_version()}; {seconds:g} s a figure")
    print(f"fsync of 4 KiB appended: {fsync_s() * 1e3:.2f} ms (median of 200)\n")
    print(f"{'database':<12}{'delay':>7}{'callers':>9}{'requests/s':>12}{'leaves/s':>10}"
          f"{'p50 ms':>9}{'p99 ms':>9}{'CPU µs/request':>16}")  # fmt: skip
    server = PostgresServer()
    try:
        for delay in (0.0, DELAY_S):
            for name in ("sqlite", "postgresql"):
                directory = Path(tempfile.mkdtemp(prefix="probity-bench-"))
                embedded = name == "sqlite"
                place = embedded_place(directory) if embedded else server_place(directory, server.database())
                _measure(name, place, delay, seconds)
                shutil.rmtree(directory)
    finally:
        server.stop()


def _measure(name: str, place: LogPlace, delay: float, seconds: float) -> None:
    log = place.open()
    if delay:
        event.listen(log.database.writer, "commit", lambda connection: time.sleep(delay))
    try:
        for callers in CALLERS:
            cpu = time.process_time()
            began = time.perf_counter()
            latencies = asyncio.run(_load(log, callers, seconds))
            took = time.perf_counter() - began
            cpu = time.process_time() - cpu
            requests = len(latencies) / 2
            cuts = statistics.quantiles(latencies, n=100)
            print(f"{name:<12}{delay * 1e3:>4.0f} ms{callers:>9}{requests / took:>12.0f}{2 * requests / took:>10.0f}"
                  f"{cuts[49] * 1e3:>9.2f}{cuts[98] * 1e3:>9.2f}{cpu / requests * 1e6:>16.0f}", flush=True)  # fmt: skip
    finally:
        log.close()


async def _load(log: AuditLog, callers: int, seconds: float) -> list[float]:
    """Return the seconds that each append took."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def call() -> None:
        while time.perf_counter() < end:
            request = request_id(next(_numbers))
            for record in (received(request, prompt=b"p" * 2_000), completed(request, texts=["o" * 1_000])):
                began = time.perf_counter()
                await log.append(record)
                latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(call() for _ in range(callers)))
    return latencies


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 3.0)
