"""Whether a model is computed by kernels that numba compiles: an accelerator of CPUs, on which nothing depends."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from engine.models.cpu_arithmetic import CpuArithmetic
from engine.models.decoder import DecoderConfig


def compiled_arithmetic(config: DecoderConfig) -> type[CpuArithmetic] | None:
    """Return the compiled arithmetic, or None where there is no numba, or no AMX, or it does not serve the model."""
    try:
        from engine.models.compiled_arithmetic import CompiledArithmetic, serves
    except ImportError:
        return None
    return CompiledArithmetic if serves(config) else None


def compiled_policy() -> Mapping[str, object]:
    """Return what the numeric policy says of compiled kernels beside their sources."""
    from llvmlite import binding

    return {
        "numba": metadata.version("numba"),
        "llvmlite": metadata.version("llvmlite"),
        "llvm": ".".join(map(str, binding.llvm_version_info)),
        "cpu": binding.get_host_cpu_name(),
    }
