"""The numeric policy: everything that the bits of an answer depend on beside its model and its request.

Bits repeat under an equal policy, and nothing is claimed across different ones. Its digest is the OpenAI
`system_fingerprint`. SHA-256 of canonical JSON, for example (shortened):

    {"attention":"fused","compiled":{"cpu":"sapphirerapids","llvm":"22.1.0","numba":"0.68.1","products":"tiles",…},
     "cpu":"avx512_core_amx…","dtype":"bfloat16","kernels":"sha256:0c…","linear":{"192x512":"fixed_tiles",…},
     "machine":"x86_64","numpy":"2.3","threads":2,"torch":"2.13.0","v":1,…}

and on a GPU:

    {"arch":"sm_90","attention":"decode_and_prefill","cublas":130002,"cuda":"13.0","device":"NVIDIA H200",
     "driver":"580.95.05","dtype":"bfloat16","linear":{"6144x4096":"by_rows",…},"torch":"2.13.0","triton":"3.7.1",…}
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import looks
from kernels import attention_plan, attention_state, launch
from kernels import linear as linear_kernel


def numeric_policy(
    linears: Mapping[tuple[int, int], str],
    segment: str,
    borrowed: Mapping[str, object] | None = None,
    compiled: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the policy of this process, its thread count set. What was chosen is named.

    `borrowed` tells whose code the layers are, where they are not ours. `compiled` tells who compiled kernels, where
    it was not Triton: attention over a bfloat16 cache is theirs then, and that over float8 the segments'.
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
        "onednn": _onednn(),
        "denormals": _keeps_denormals(),
        "dtype": "bfloat16",
        "linear": {f"{rows}x{columns}": name for (rows, columns), name in linears.items()},
        "linear_tile_rows": linear_kernel.TILE_M,
        "attention": segment,
        "attention_tile": attention_plan.TILE,
        "attention_segment": attention_plan.SEGMENT,
        "attention_rows": attention_plan.ROWS,
        "borrowed": borrowed,
        "compiled": None if compiled is None else dict(compiled),
        "grammar": _version("llguidance"),
        "kernels": _sources("kernels"),
        "arithmetic": _sources("engine.models", "engine"),
    }


def with_kv_cache(policy: Mapping[str, object], dtype: str) -> dict[str, object]:
    """Return the policy of an engine that keeps keys and values in `dtype`, by the name of the setting."""
    return {**policy, "kv_cache": dtype}


def device_policy(
    device: torch.device,
    linears: Mapping[tuple[int, int], str],
    attention: str,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, object]:
    """Return the policy of an engine on a GPU, once its libraries are loaded. What was chosen is named.

    The host's share is in it too: it works out the tables of rotations, and adds up what is pooled.
    """
    return {
        "v": 1,
        **_gpu(device),
        "host": {
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "instructions": _instructions(),
            "numpy": np.__version__,
        },
        "torch": torch.__version__,
        "build": "sha256:" + hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "triton": _version("triton"),
        "environment": {name: environment[name] for name in (*_SWITCHES, *_GPU_SWITCHES) if name in environment},
        "dtype": "bfloat16",
        "linear": {f"{rows}x{columns}": name for (rows, columns), name in linears.items()},
        "linear_few_rows": linear_kernel.FEW_ROWS,
        "attention": attention,
        "attention_tile": attention_state.TILE,
        "attention_segment": attention_state.SEGMENT,
        "launches": "sha256:" + hashlib.sha256(repr(launch.TABLE).encode()).hexdigest(),
        "alternatives": list(looks.TIERS),
        "grammar": _version("llguidance"),
        "kernels": _sources("kernels"),
        "arithmetic": _sources("engine.models", "engine"),
    }


def _gpu(device: torch.device) -> dict[str, object]:
    """Return what the hardware and its libraries say of themselves."""
    if device.type != "cuda":
        return {"device": "interpreter"}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "arch": f"sm_{major}{minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cublas": _cublas(),
    }


def _driver() -> str:
    """Return the driver's version, or where nothing tells it that of the interface that it offers."""
    for path in _DRIVER_SAYS:
        try:
            found = re.search(r"\d+\.\d+(\.\d+)?", Path(path).read_text(encoding="ascii", errors="replace"))
        except OSError:
            continue
        if found:
            return found.group()
    ask: Any = torch._C
    return f"cuda {ask._cuda_getDriverVersion()}"


def _cublas() -> int | None:
    """Return the version of the library of products that this process loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            loaded = next((found.group() for line in file if (found := _CUBLAS.search(line))), None)
        return None if loaded is None else int(ctypes.CDLL(loaded).cublasLtGetVersion())
    except (OSError, AttributeError):
        return None


def digest(policy: Mapping[str, object]) -> str:
    canonical = json.dumps(policy, sort_keys=True, separators=(",", ":")).encode()
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


# What makes a library choose other kernels on the same machine.
_SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_CPU_ISA_HINTS",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NPY_ENABLE_CPU_FEATURES",
    "NUMBA_CPU_FEATURES",
    "NUMBA_CPU_NAME",
    "NUMBA_LOOP_VECTORIZE",
    "NUMBA_OPT",
    "NUMBA_SLP_VECTORIZE",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
_GPU_SWITCHES = (
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "DISABLE_PTXAS_OPT",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PTXAS_OPTIONS",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_KERNEL_OVERRIDE",
    "TRITON_LIBDEVICE_PATH",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_OVERRIDE_DIR",
    "TRITON_PTXAS_PATH",
)
_DRIVER_SAYS = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")
_CUBLAS = re.compile(r"/\S*libcublasLt\.so\S*")
ARITHMETIC = frozenset(
    {
        "adapter_stacks.py",
        "adapters.py",
        "arithmetic.py",
        "borrowed.py",
        "borrowed_config.py",
        "compiled.py",
        "compiled_arithmetic.py",
        "cpu_arithmetic.py",
        "decoder.py",
        "device.py",
        "device_runner.py",
        "experts.py",
        "grammar.py",
        "logprobs.py",
        "looks.py",
        "model_runner.py",
        "paged_step.py",
        "plan.py",
        "pooling.py",
        "products.py",
        "repeated_pass.py",
        "rope_table.py",
        "rows.py",
        "sampler.py",
        "sequence.py",
        "shard.py",
        "transfer.py",
        "triton_arithmetic.py",
        "weights.py",
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
            if file.name.endswith(".py") and (package == "kernels" or file.name in ARITHMETIC):
                mixed.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return "sha256:" + mixed.hexdigest()


def _onednn() -> dict[str, object]:
    """Return what a program around the engine may have set for the whole process: it may let products of float32, by
    which `segment_tiled` goes, be of bfloat16."""
    library: Any = torch.backends.mkldnn
    said = library.matmul.fp32_precision
    return {"enabled": library.enabled, "float32": "ieee" if said == "none" else said}


def _keeps_denormals() -> bool:
    """Return whether numbers below the least normal one are computed with here, or taken for zeros."""
    return bool(torch.full((1,), 1e-38) * 0.01 != 0)


def _instructions() -> str:
    """Return the digest of the CPU's instruction sets: libraries choose their kernels by them."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line.partition(":")[2].split() for line in file if line.startswith("flags")), [])
    except OSError:
        flags = [platform.processor()]
    return "sha256:" + hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()
