"""Whether a model is computed by kernels that numba compiles: an accelerator of CPUs, on which nothing depends."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import metadata
from typing import NamedTuple

from engine.models.cpu_arithmetic import CpuArithmetic, Gated
from engine.models.decoder import DecoderConfig
from kernels.linear import Linear, Pack


def compiled_arithmetic(config: DecoderConfig, products: Collection[str]) -> type[CpuArithmetic] | None:
    """Return the compiled arithmetic for a model whose products were chosen by these names.

    None where there is no numba, or no bfloat16 in the CPU, or it does not serve the model.
    """
    try:
        from engine.models.compiled_arithmetic import CompiledArithmetic, CompiledThroughout, serves
    except ImportError:
        return None
    if not serves(config):
        return None
    return CompiledThroughout if compiled_products().keys() >= set(products) else CompiledArithmetic


class CompiledProduct(NamedTuple):
    multiply: Linear
    pack: Pack
    gated: Gated


def compiled_products() -> Mapping[str, CompiledProduct]:
    """Return the compiled products by name: none where there is no numba, or no bfloat16 in the CPU."""
    try:
        from kernels.lanes import has_pairs
        from kernels.tile_linear import lay_out, tile_linear, tile_silu_mul
    except ImportError:
        return {}
    return {"tiles": CompiledProduct(tile_linear, lay_out, tile_silu_mul)} if has_pairs() else {}


def compiled_policy() -> Mapping[str, object]:
    """Return what the numeric policy says of compiled kernels beside their sources."""
    from llvmlite import binding

    from kernels.lanes import has_tiles

    return {
        "products": "tiles" if has_tiles() else "pairs",
        "numba": metadata.version("numba"),
        "llvmlite": metadata.version("llvmlite"),
        "llvm": ".".join(map(str, binding.llvm_version_info)),
        "cpu": binding.get_host_cpu_name(),
    }
