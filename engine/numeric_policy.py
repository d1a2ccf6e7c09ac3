"""The numeric policy: everything that the bits of an answer depend on beside its model and its request.

Bits repeat under an equal policy, and nothing is claimed across different ones. Its digest is the OpenAI
`system_fingerprint`. SHA-256 of canonical JSON, for example (shortened):

    {"attention":"fused","cpu":"avx512_core_amx…","dtype":"bfloat16","kernels":"sha256:0c…","linear":{"192x512":"fixed_tiles",…},"machine":"x86_64",
     "numpy":"2.3","threads":2,"torch":"2.13.0","v":1,…}
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from importlib.resources import files

import numpy as np
import torch

from kernels import attention_plan
from kernels import linear as linear_kernel


def numeric_policy(
    linears: Mapping[tuple[int, int], str], segment: str, borrowed: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Return the policy of this process, its thread count set. What was chosen is named.

    `borrowed` tells whose code the layers are, where they are not ours.
    """
    return {
        "v": 1,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "instructions": _instructions(),
        "torch": torch.__version__,
        "build": "sha256:" + hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "numpy": np.__version__,
        "environment": {name: os.environ[name] for name in _SWITCHES if name in os.environ},
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16",
        "linear": {f"{rows}x{columns}": name for (rows, columns), name in linears.items()},
        "linear_tile_rows": linear_kernel.TILE_M,
        "attention": segment,
        "attention_tile": attention_plan.TILE,
        "attention_segment": attention_plan.SEGMENT,
        "attention_rows": attention_plan.ROWS,
        "borrowed": borrowed,
        "grammar": _version("llguidance"),
        "kernels": _sources("kernels"),
        "arithmetic": _sources("engine.models", "engine"),
    }


def with_kv_cache(policy: Mapping[str, object], dtype: str) -> dict[str, object]:
    """Return the policy of an engine that keeps keys and values in `dtype`, by the name of the setting."""
    return {**policy, "kv_cache": dtype}


def digest(policy: Mapping[str, object]) -> str:
    canonical = json.dumps(policy, sort_keys=True, separators=(",", ":")).encode()
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


# What makes a library choose other kernels on the same machine.
_SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
_ARITHMETIC = frozenset(
    {
        "adapters.py",
        "borrowed.py",
        "decoder.py",
        "experts.py",
        "grammar.py",
        "logprobs.py",
        "model_runner.py",
        "paged_step.py",
        "pooling.py",
        "products.py",
        "rope_table.py",
        "rows.py",
        "sampler.py",
    }
)


def _version(package: str) -> str | None:
    """Return the version of a library that an engine can do without."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sources(*packages: str) -> str:
    """Return the digest of the source files that compute."""
    mixed = hashlib.sha256()
    for package in packages:
        for file in sorted(files(package).iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py") and (package == "kernels" or file.name in _ARITHMETIC):
                mixed.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return "sha256:" + mixed.hexdigest()


def _instructions() -> str:
    """Return the digest of the CPU's instruction sets: libraries choose their kernels by them."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line.partition(":")[2].split() for line in file if line.startswith("flags")), [])
    except OSError:
        flags = [platform.processor()]
    return "sha256:" + hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()
