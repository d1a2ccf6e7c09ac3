"""Tiny random models of families that are served through transformers' own code. See tiny_models.py.

Together they have every feature of attention: windows (alone, by layer, with a rope of their own), capped scores,
sinks, norms of heads, norms after instead of before, fused weights, three kinds of experts, and no groups of heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.tiny_models import CONTEXT, VOCABULARY, make_tokenizer

if TYPE_CHECKING:
    import torch

WINDOW = 80
BORROWED = ("gemma2", "gemma3", "phi3", "olmo2", "gpt_oss", "mixtral", "qwen3_moe", "mistral_window")
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0}


def _config(family: str) -> Any:
    import transformers as theirs

    if family == "gemma2":
        return theirs.Gemma2Config(**_COMMON, **_CAPS, head_dim=32, query_pre_attn_scalar=24, sliding_window=WINDOW)
    if family == "gemma3":
        types = ["sliding_attention", "full_attention"]
        return theirs.Gemma3TextConfig(**_COMMON, head_dim=32, sliding_window=WINDOW, layer_types=types)
    if family == "phi3":
        return theirs.Phi3Config(**_COMMON, sliding_window=WINDOW)
    if family == "olmo2":
        return theirs.Olmo2Config(**{**_COMMON, "num_key_value_heads": 4})
    if family == "gpt_oss":
        moe = {"num_local_experts": 8, "num_experts_per_tok": 3}
        rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
        return theirs.GptOssConfig(**_COMMON, **moe, head_dim=32, sliding_window=WINDOW, rope_parameters=rope)
    if family == "mixtral":
        return theirs.MixtralConfig(**_COMMON, num_local_experts=5, num_experts_per_tok=2)
    if family == "qwen3_moe":
        moe = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True}
        return theirs.Qwen3MoeConfig(**_COMMON, **moe, head_dim=32)
    return theirs.MistralConfig(**_COMMON, sliding_window=WINDOW)  # native but for its window


def make_family(family: str, seed: int = 0) -> Any:
    """Return a `transformers` model in bfloat16 with its weights drawn from `seed`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_config(family)).eval()
    generator = torch.Generator().manual_seed(seed)
    around_zero = family.startswith("gemma")  # their norms multiply by 1 + weight
    for name, parameter in model.named_parameters():
        parameter.data = _draw(name, tuple(parameter.shape), generator, around_zero)
    return model.to(torch.bfloat16)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, around_zero: bool) -> torch.Tensor:
    import torch

    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        if "norm" in name:
            return (0 if around_zero else 1) + 0.2 * noise
        return 0.5 * noise  # biases, sinks
    if "embed" in name:
        return 0.5 * noise
    if "bias" in name:  # of experts
        return 0.2 * noise
    return noise * (4.0 if "lm_head" in name else 1.3) / shape[-1] ** 0.5


def write_family(directory: Path, family: str, **saving: Any) -> Path:
    """Write a model with its tokenizer; `saving` goes to `save_pretrained` (shard size, …)."""
    make_family(family).save_pretrained(directory, **saving)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each family."""
    root = tmp_path_factory.mktemp("families")
    return {family: write_family(root / family, family) for family in BORROWED}
