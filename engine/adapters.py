"""Adapters: fine-tunings that are loaded beside the model, from local PEFT directories, and a version for each.

    adapter_config.json        {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"],
                                "use_rslora": false, "bias": "none", …}
    adapter_model.safetensors  base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  [16, K]
                               base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight  [N, 16]

A module computes x·Wᵀ + s·x·Aᵀ·Bᵀ, where s is lora_alpha / r, with rslora lora_alpha / √r. s is multiplied into B in
float32 and rounded to bfloat16 once. Whatever of a configuration would change more than that is refused by name, and
so is a member that is not known here. Tokenizer and chat template are the model's, whatever else the directory holds.

The digest of an adapter is over both files, as that of a model over its own (weights.py):

    sha256:d4… = SHA-256("sha256:0b… adapter_config.json\\nsha256:e3… adapter_model.safetensors\\n")

Source: Hu et al., ICLR 2022 (LoRA); Kalajdzievski, 2023 (rslora).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineStartError
from engine.models.arithmetic import Adapter
from engine.models.decoder import DecoderConfig, parameter_shapes, product_parts
from engine.reading import Progress, Reading, WeightsError, silently
from engine.request import AdapterVersion, ModelVersion
from engine.shard import Shard, Stored
from engine.weights import CASTABLE, joined_digest, version_digest
from kernels.low_rank import LowRank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a module's name in the weights
MAX_RANK = 512
MAX_ALPHA = 65_536
ALL_LINEAR = "all-linear"  # every module of a layer
UNSERVED_MODULES = ("model.embed_tokens", "lm_head")

# Members of the configuration that say how it came about, or how it was trained.
_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
# Every other member is refused where it is set, but for these values. An initialisation that is not named here has
# changed the model's weights as well.
_ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "task_type": ("CAUSAL_LM",),
}
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"})


class AdapterError(EngineStartError):
    """An adapter cannot be loaded, or asks for what is not served; the message names it."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The members of `adapter_config.json` that the arithmetic depends on."""

    rank: int  # r, 1 … MAX_RANK
    scale: float  # s
    targets: str | tuple[str, ...]  # a pattern of modules' whole names, or how they end


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    adapter: Adapter
    version: ModelVersion  # of the model with it


def load_adapters(
    sources: Iterable[tuple[str, Path]],  # name, directory
    config: DecoderConfig,
    base: ModelVersion,
    progress: Progress = silently,
) -> dict[str, LoadedAdapter]:
    """Return adapters of a model by their names.

    Raises:
        AdapterError: one cannot be loaded, or two are the same.
    """
    loaded: dict[str, LoadedAdapter] = {}
    names: dict[str, str] = {}  # by version
    for name, directory in sources:
        try:
            reading = read_adapter(directory, progress)
            adapter = load_adapter(reading, config)
            version = version_with(base, name, reading)
        except (AdapterError, WeightsError) as refused:
            raise AdapterError(f"adapter `{name}`: {refused}") from refused
        if version.digest in names:
            raise AdapterError(f"adapters `{names[version.digest]}` and `{name}` are the same; load one of them")
        names[version.digest] = name
        loaded[name] = LoadedAdapter(adapter, version)
    return loaded


def read_adapter(directory: Path, progress: Progress = silently) -> Reading:
    """Begin the reading of an adapter's directory. Raises AdapterError."""
    reading = Reading(directory, progress, "the adapter's directory")
    for file in (CONFIG, WEIGHTS):
        if not reading.has(file):
            raise AdapterError(f"`{file}` is missing in the adapter's directory; save it with PEFT as safetensors")
    return reading


def adapter_version(base: ModelVersion, name: str, directory: Path) -> ModelVersion:
    """Return the version of the model `base` with the adapter in `directory`. Raises AdapterError, WeightsError."""
    return version_with(base, name, read_adapter(directory))


def version_with(base: ModelVersion, name: str, reading: Reading) -> ModelVersion:
    """Return the version of the model `base` with the adapter that was read, or is read now.

    Raises:
        WeightsError: a file cannot be read, or is not what it was any more.
    """
    digest = joined_digest(reading, (CONFIG, WEIGHTS))
    reading.verify_unchanged()
    version = replace(base, adapter=AdapterVersion(name, digest))
    return replace(version, digest=version_digest(version))


def load_adapter(reading: Reading, config: DecoderConfig) -> Adapter:
    """Return the adapter of a directory, in bfloat16.

    Raises:
        AdapterError: it asks for what is not served, or does not fit the model.
        WeightsError: a file cannot be read, or was changed meanwhile.
    """
    read = read_config(reading)
    sizes = _module_sizes(config)
    targets = _targets(read.targets, sizes)
    tensors = _tensors(reading, _expected(read.rank, targets, sizes))
    layers = [_layer(index, config, read, targets, tensors) for index in range(config.num_hidden_layers)]
    return Adapter(tuple(layers))


# --- the configuration ---


def read_config(reading: Reading) -> AdapterConfig:
    """Read `adapter_config.json`. Raises AdapterError, WeightsError."""
    values = reading.json(CONFIG)
    _refuse_features(values)
    rank = values.get("r")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"`r` of `{CONFIG}` must be a whole number between 1 and {MAX_RANK}")
    scale = _scale(rank, values.get("lora_alpha"), values.get("use_rslora", False))
    return AdapterConfig(rank, scale, _stated_targets(values))


def _scale(rank: int, alpha: object, rooted: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:  # so is no NaN
        raise AdapterError(f"`lora_alpha` of `{CONFIG}` must be a number of at most {MAX_ALPHA:,}")
    if not isinstance(rooted, bool):
        raise AdapterError(f"`use_rslora` of `{CONFIG}` must be true or false")
    return alpha / (math.sqrt(rank) if rooted else rank)


def _refuse_features(values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise AdapterError(f"`peft_type` of `{CONFIG}` is not `LORA`, which alone is served")
    for name, value in sorted(values.items()):
        if name in _READ or name in _NEUTRAL or _is_unset(value):
            continue
        if not any(value is accepted or value == accepted for accepted in _ACCEPTED.get(name, ())):
            raise AdapterError(f"`{name}` of `{CONFIG}` is set to what is not served")


def _is_unset(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})  # 0 may be the number of a layer


def _stated_targets(values: Mapping[str, Any]) -> str | tuple[str, ...]:
    stated = values.get("target_modules")
    if isinstance(stated, str) and stated:
        return stated
    if isinstance(stated, list) and stated and all(isinstance(name, str) and name for name in stated):
        return tuple(stated)
    raise AdapterError(f"`target_modules` of `{CONFIG}` must be a list of modules, or a pattern of their names")


# --- the modules ---


def _module_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return the (N, K) of every module that an adapter may change, by its name in the model."""
    shapes = parameter_shapes(config)
    parts = [module for modules in product_parts(config).values() for module, _ in modules]
    sizes = {}
    for index in range(config.num_hidden_layers):
        for part in parts:
            outputs, inputs = shapes[f"model.layers.{index}.{part}.weight"]
            sizes[f"model.layers.{index}.{part}"] = (outputs, inputs)
    return sizes


def _targets(stated: str | tuple[str, ...], sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the modules that are meant. Raises AdapterError: none of the model's, or one that is not served."""
    if stated == ALL_LINEAR:
        return list(sizes)
    modules = [*sizes, *UNSERVED_MODULES]
    patterns = [stated] if isinstance(stated, str) else [rf"(?:.*\.)?{re.escape(end)}" for end in stated]
    meant: set[str] = set()
    for pattern, shown in zip(patterns, [stated] if isinstance(stated, str) else stated, strict=True):
        found = _matching(pattern, modules)
        if not found:
            raise AdapterError(f"`target_modules` names `{shown}`, which is not a linear module of this model")
        meant.update(found)
    for name in UNSERVED_MODULES:
        if name in meant:
            raise AdapterError(f"`target_modules` reaches `{name}`: embeddings and logits are not adapted here")
    return [name for name in sizes if name in meant]


def _matching(pattern: str, modules: Iterable[str]) -> list[str]:
    try:
        return [name for name in modules if re.fullmatch(pattern, name)]
    except re.error as error:
        raise AdapterError(f"`target_modules` of `{CONFIG}` is not a pattern that can be read") from error


# --- the weights ---


def _expected(rank: int, targets: Iterable[str], sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    expected = {}
    for module in targets:
        outputs, inputs = sizes[module]
        expected[_weight(module, "A")] = (rank, inputs)
        expected[_weight(module, "B")] = (outputs, rank)
    return expected


def _weight(module: str, factor: str) -> str:
    return f"{PREFIX}{module}.lora_{factor}.weight"


def _tensors(reading: Reading, expected: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return the weights of `expected`, in float32. Raises AdapterError: one is missing, too many, or another."""
    with reading.stream(WEIGHTS) as stream:
        shard = Shard(stream)
        for one in shard.weights:
            _check(one, expected)
        tensors = {one.name: tensor.float() for one, tensor in shard.read()}
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise AdapterError(f"the weight `{missing[0]}` is missing ({len(missing)} in all)")
    return tensors


def _check(one: Stored, expected: Mapping[str, tuple[int, int]]) -> None:
    wanted = expected.get(one.name)
    if wanted is None:
        raise AdapterError(f"the weight `{one.name}` is not one that `{CONFIG}` speaks of and this model has")
    if one.shape != wanted:
        raise AdapterError(f"the weight `{one.name}` has shape {list(one.shape)}, not {list(wanted)}")
    if one.kind not in CASTABLE:
        raise AdapterError(f"the weight `{one.name}` is {one.kind}, which is not cast to bfloat16")


def _layer(
    index: int, config: DecoderConfig, read: AdapterConfig, targets: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, LowRank]:
    """Return what is added to each product of a layer, by its name; one without a target is left out."""
    prefix = f"model.layers.{index}."
    meant = {name.removeprefix(prefix) for name in targets if name.startswith(prefix)}
    layer = {}
    for product, parts in product_parts(config).items():
        chosen = [module for module, _ in parts if module in meant]
        if chosen:
            down = torch.cat([tensors[_weight(prefix + module, "A")] for module in chosen])
            layer[product] = LowRank(down.to(torch.bfloat16), _up(prefix, parts, chosen, read, tensors))
    return layer


def _up(
    prefix: str,
    parts: Iterable[tuple[str, int]],
    chosen: list[str],
    read: AdapterConfig,
    tensors: Mapping[str, Tensor],
) -> Tensor:
    """Return B of a fused product: of every part its rows, of every chosen one its columns, zero elsewhere.

    Zeros change no bit of a sum, and one product for all parts is faster than one for each.
    """
    blocks = []
    for module, outputs in parts:
        block = torch.zeros(outputs, read.rank * len(chosen))
        if module in chosen:
            first = read.rank * chosen.index(module)
            block[:, first : first + read.rank] = tensors[_weight(prefix + module, "B")] * read.scale
        blocks.append(block)
    return torch.cat(blocks).to(torch.bfloat16)
