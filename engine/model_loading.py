"""From a model directory to a model: natively where decoder.py knows the family, else by transformers' own code.

A family that decoder.py knows, with a feature that it does not (a window, another rope), goes the second way too. On a
GPU there is the first way alone: what transformers' own code does along the tokens there was not looked at.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import probe
from engine.config import UnsupportedModel
from engine.device import (
    ATTENTION,
    choose_attention,
    choose_products,
    named_refusals,
    refuse_cache,
    refuse_too_many_blocks,
    verify_device_adapters,
)
from engine.device_runner import DeviceRunner
from engine.model_runner import (
    CACHED_AS,
    LinearAsMet,
    LinearByShape,
    ModelRunner,
    choose_linears,
    choose_segment,
    products_here,
    verify_adapters,
)
from engine.models.arithmetic import Adapter
from engine.models.borrowed import BorrowedModel, build
from engine.models.borrowed_config import BorrowedConfig, model_class
from engine.models.compiled import compiled_arithmetic, compiled_policy, compiled_products
from engine.models.cpu_arithmetic import CpuArithmetic, StepInputs
from engine.models.decoder import ARCHITECTURES, Decoder, DecoderConfig, parameter_shapes
from engine.models.model import Model, ModelShape
from engine.models.rows import missing_rows
from engine.models.triton_arithmetic import DeviceInputs, TritonArithmetic
from engine.numeric_policy import device_policy, numeric_policy
from engine.plan import Runner
from engine.reading import Reading
from engine.weights import load_parameters, load_tensors
from kernels.paged_attention import SEGMENTS


class HandedOver(Mapping[str, Tensor]):
    """Parameters, each of which is given out once and then forgotten: who lays it out anew does not hold it twice."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Take what is in `tensors` out of it, by and by."""
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.pop(name)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One on the CPU."""

    model: Model[StepInputs]
    policy: Mapping[str, object]  # the numeric policy
    cast: tuple[str, ...]  # the types that weights were cast from

    @property
    def config(self) -> ModelShape:
        return self.model.config

    def runner(self, blocks: int, adapters: Mapping[str, Adapter], kv_cache_dtype: str = "bfloat16") -> Runner:
        """Return what carries out steps, with so many blocks of keys and values. Raises InvarianceUnavailable."""
        verify_adapters(adapters.values())
        return ModelRunner(self.model, blocks, adapters, kv_cache_dtype)


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """One on a GPU."""

    config: DecoderConfig
    model: Model[DeviceInputs]
    arithmetic: TritonArithmetic
    policy: Mapping[str, object]
    cast: tuple[str, ...]
    most_rows: int

    def runner(self, blocks: int, adapters: Mapping[str, Adapter], kv_cache_dtype: str = "bfloat16") -> Runner:
        """Return what carries out steps. Raises InvarianceUnavailable, DeviceUnavailable."""
        refuse_too_many_blocks(self.config, blocks)
        with named_refusals(self.arithmetic.device):
            verify_device_adapters(adapters.values(), self.most_rows, self.arithmetic.device)
            runner = DeviceRunner(self.model, self.arithmetic, blocks, adapters, kv_cache_dtype)
            runner.warm_up(self.most_rows)
        return runner


def load_device_model(
    reading: Reading, most_rows: int, device: torch.device, kv_cache_dtype: str = "bfloat16"
) -> DeviceModel:
    """Load the model of a directory on a GPU. At most `most_rows` tokens will be in a step.

    Raises: EngineStartError and its kinds.
    """
    config = configuration(reading.json("config.json"))
    if not isinstance(config, DecoderConfig):
        raise UnsupportedModel(f"`{config.architecture}` is served on the CPU only; set `device` to `cpu`")
    refuse_cache(device, kv_cache_dtype)
    with named_refusals(device):
        products = choose_products(config, most_rows, device)
        attention = choose_attention(config, device, CACHED_AS[kv_cache_dtype])
        arithmetic = TritonArithmetic(device, products, ATTENTION[attention])
        weights = load_parameters(reading, parameter_shapes(config))
        decoder = Decoder(config, HandedOver(weights.tensors), arithmetic)
    policy = device_policy(device, products, attention)
    return DeviceModel(config, decoder, arithmetic, policy, weights.cast, most_rows)


def load_model(
    reading: Reading, most_rows: int, context_length: int | None = None, compiled: bool = True
) -> LoadedModel:
    """Load the model of a directory on the CPU. At most `most_rows` tokens will be in a step.

    Unless `compiled`, kernels that numba compiles are not looked for.

    Raises: EngineStartError and its kinds.
    """
    config = configuration(reading.json("config.json"), context_length)
    if isinstance(config, DecoderConfig):
        return _native(reading, config, most_rows, compiled)
    return _borrowed(reading, config, most_rows, context_length)


def configuration(values: Mapping[str, Any], context_length: int | None = None) -> DecoderConfig | BorrowedConfig:
    """Return how the model of a `config.json` is served. Raises UnsupportedModel."""
    native = (values.get("architectures") or ["none"])[0] in ARCHITECTURES
    try:
        return DecoderConfig.from_json(values)
    except UnsupportedModel as refused:
        try:
            return BorrowedConfig.from_json(values, context_length)
        except UnsupportedModel:
            if native:  # what the family's own page says of it is the better answer
                raise refused from None
            raise


def _native(reading: Reading, config: DecoderConfig, most_rows: int, compiled: bool) -> LoadedModel:
    segment = choose_segment(config)
    linears = choose_linears(config, most_rows, products_here(compiled))
    weights = load_parameters(reading, parameter_shapes(config))
    linear = LinearByShape(linears)
    found = compiled_arithmetic(config, linears.values()) if compiled else None
    arithmetic = (found or CpuArithmetic)(linear, SEGMENTS[segment], linear.pack, linear.gated)
    decoder = Decoder(config, HandedOver(weights.tensors), arithmetic)
    uses = found is not None or not set(linears.values()).isdisjoint(compiled_products())
    policy = numeric_policy(linears, segment, compiled=compiled_policy() if uses else None)
    return LoadedModel(decoder, policy, weights.cast)


def _borrowed(reading: Reading, config: BorrowedConfig, most_rows: int, context_length: int | None) -> LoadedModel:
    segment = choose_segment(config)
    linear = LinearAsMet(most_rows + missing_rows(most_rows))
    weights = load_tensors(reading)
    module = build(config, weights.tensors)
    tokens = probe.probe_tokens(config.vocab_size, config.windows, config.max_position_embeddings)
    expected = probe.reference(module, tokens)
    positions = max(min(context_length or sys.maxsize, config.max_position_embeddings), len(tokens))
    model = BorrowedModel(config, module, linear, SEGMENTS[segment], positions)
    probe.verify(model, tokens, expected)
    linears = {shape: name for (shape, kind), name in linear.chosen.items() if kind == torch.bfloat16}
    return LoadedModel(model, numeric_policy(linears, segment, _provenance(config, linear)), weights.cast)


def _provenance(config: BorrowedConfig, linear: LinearAsMet) -> dict[str, object]:
    """Return whose code the layers are, and the products that are not in bfloat16."""
    source = sys.modules[model_class(config.architecture).__module__].__file__
    assert source is not None  # transformers is installed as files
    others = {f"{n}x{k} {kind}": name for ((n, k), kind), name in linear.chosen.items() if kind != torch.bfloat16}
    return {
        "architecture": config.architecture,
        "transformers": metadata.version("transformers"),
        "source": "sha256:" + hashlib.sha256(Path(source).read_bytes()).hexdigest(),
        "linear": others,
    }
