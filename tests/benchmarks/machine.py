"""The machine a figure was measured on, in one line, and its disk."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from pathlib import Path
from statistics import median


def describe_machine() -> str:
    """Return e.g. `Intel(R) Xeon(R) Processor, 2 CPUs, amx_bf16 avx512_bf16, Linux 6.1, Python 3.11.7`."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    features = [feature for feature in ("amx_bf16", "avx512_bf16", "avx2") if f" {feature} " in info]
    parts = [
        name.group(1) if name else platform.machine(),
        f"{os.cpu_count()} CPUs",
        " ".join(features[:2]),
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
    ]
    return ", ".join(part for part in parts if part)


def fsync_s(directory: Path | None = None) -> float:
    """Return the seconds that an fsync of 4 KiB appended takes there, the median of 200."""
    times = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(200):
            file.write(b"x" * 4096)
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times)
