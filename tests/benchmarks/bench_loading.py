"""Loading a model: what it costs to hash what is read while it is read, and how much memory the loading takes.

    python -m tests.benchmarks.bench_loading [--shape half-billion]

Each line is a process of its own, over the same shards in the system's cache; CPU time, not wall time. "twice" is what
one reading replaces: every file hashed, and then read again. Asserts nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.model_loading import load_model
from engine.models.decoder import DecoderConfig, parameter_shapes
from engine.reading import Reading
from engine.weights import digest_directory, load_parameters, version_of
from tests.benchmarks.checkpoint import SHAPES, write_checkpoint
from tests.benchmarks.machine import describe_machine

MEBI = 1 << 20


def hashed(directory: Path) -> None:
    digest_directory(directory)


def twice(directory: Path) -> None:
    digest_directory(directory)
    _ = [tensor.clone() for path in directory.glob("*.safetensors") for tensor in load_file(path).values()]


def once(directory: Path) -> None:
    reading = Reading(directory)
    _ = load_parameters(reading, parameter_shapes(DecoderConfig.from_json(reading.json("config.json"))))
    version_of(reading)


def loaded(directory: Path) -> None:
    reading = Reading(directory)
    _ = load_model(reading, 512)
    version_of(reading)


def sha256_gigabytes_a_second() -> float:
    data, begun = bytes(64 * MEBI), time.thread_time()
    hashlib.sha256(data)
    return len(data) / (time.thread_time() - begun) / 1e9


def measure(work: Callable[[Path], None], directory: Path) -> tuple[float, float]:
    """Return CPU seconds and the growth of the largest resident memory, in MiB, of a process that does it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, directory))


def _measured(work: Callable[[Path], None], directory: Path) -> tuple[float, float]:
    torch.set_num_threads(1)
    before, begun = _peak_mib(), time.process_time()
    work(directory)
    return time.process_time() - begun, _peak_mib() - before


def _peak_mib() -> float:
    """Of this process; what `getrusage` tells may be its parent's."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="half-billion")
    arguments = parser.parse_args()
    print(f"{describe_machine()}; torch {torch.__version__}; SHA-256 of memory {sha256_gigabytes_a_second():.2f} GB/s")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_checkpoint(arguments.shape, directory, max_shard_size="200MB")
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        print(f"{arguments.shape}: {size / MEBI:.0f} MiB in {len(list(directory.glob('*.safetensors')))} shards")
        print(f"{'':<34} {'CPU s':>6} {'peak memory ÷ size':>19}")
        for name, work in (
            ("hashed alone", hashed),
            ("hashed, then read again (twice)", twice),
            ("hashed while read (once)", once),
            ("loaded whole, products laid out", loaded),
        ):
            seconds, grown = measure(work, directory)
            print(f"{name:<34} {seconds:>6.2f} {grown * MEBI / size:>19.2f}", flush=True)


if __name__ == "__main__":
    main()
