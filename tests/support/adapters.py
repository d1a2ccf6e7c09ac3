"""Tiny random adapters for the tiny models, as PEFT writes them to a directory; and the same weights merged by hand.

The factors are drawn wide, so that an adapter changes what is said and not only how sure the model is of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.models.decoder import DecoderConfig, parameter_shapes
from engine.reading import Reading

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(
    directory: Path,
    model: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: tuple[str, ...] = EVERY,
    dtype: torch.dtype = torch.float32,
    **changes: Any,  # of the configuration; `...` leaves a member out
) -> Path:
    """Write an adapter of a model. Returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    values = _configuration(rank, targets) | changes
    written = {name: value for name, value in values.items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(written))
    save_file(draw_factors(model, seed, rank, targets, dtype), directory / "adapter_model.safetensors")
    return directory


def _configuration(rank: int, targets: tuple[str, ...]) -> dict[str, Any]:
    """As PEFT 0.18 writes it."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 2 * rank,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.18.0",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(targets),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }


def draw_factors(
    model: Path, seed: int, rank: int, targets: tuple[str, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    shapes = parameter_shapes(DecoderConfig.from_json(Reading(model).json("config.json")))
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            down = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
            up = 0.25 * torch.randn(shape[0], rank, generator=generator) / rank**0.5
            factors[f"base_model.model.{module}.lora_A.weight"] = down.to(dtype)
            factors[f"base_model.model.{module}.lora_B.weight"] = up.to(dtype)
    return factors


def merge(directory: Path, model: Path, adapter: Path) -> Path:
    """Write the model with the adapter merged into its weights, in float32. Returns its directory."""
    values = json.loads((adapter / "adapter_config.json").read_bytes())
    scale = values["lora_alpha"] / (values["r"] ** 0.5 if values["use_rslora"] else values["r"])
    factors = load_file(adapter / "adapter_model.safetensors")
    shutil.copytree(model, directory)
    weights = {name: weight.float() for name, weight in load_file(model / "model.safetensors").items()}
    for name, down in factors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = factors[name.replace("lora_A", "lora_B")].double() @ down.double()
            weights[f"{module}.weight"] += (scale * delta).float()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory
