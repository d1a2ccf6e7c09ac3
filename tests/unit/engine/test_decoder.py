"""Reading a configuration: the features that are served, and the refusal by name of every one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import UnsupportedModel
from engine.models.decoder import DecoderConfig, inverse_frequencies, parameter_shapes
from tests.support.tiny_models import FAMILIES, LLAMA3_ROPE


def values(tiny_models: dict[str, Path], family: str, **changes: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((tiny_models[family] / "config.json").read_bytes())
    return {name: value for name, value in {**read, **changes}.items() if value is not ...}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_read_with_its_own_features(family: str, tiny_models: dict[str, Path]) -> None:
    config = DecoderConfig.from_json(values(tiny_models, family))
    assert config.family == family
    assert config.qkv_bias is (family == "qwen2")
    assert config.qk_norm is (family == "qwen3")
    assert config.tie_word_embeddings is (family == "qwen2")
    assert (config.rope_scaling is not None) is (family == "llama")
    names = parameter_shapes(config)
    assert ("lm_head.weight" in names) is (family != "qwen2")
    assert ("model.layers.1.self_attn.k_proj.bias" in names) is (family == "qwen2")
    assert ("model.layers.0.self_attn.q_norm.weight" in names) is (family == "qwen3")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "`GPT2LMHeadModel`"),
        ("llama", {"architectures": ...}, "`none`"),
        ("llama", {"hidden_act": "gelu"}, "`hidden_act`"),
        ("llama", {"quantization_config": {"bits": 4}}, "`quantization_config`"),
        ("llama", {"attention_bias": True}, "`attention_bias`"),
        ("llama", {"mlp_bias": True}, "`mlp_bias`"),
        ("qwen3", {"attention_bias": True}, "`attention_bias`"),
        ("mistral", {"sliding_window": 64}, "`sliding_window` of 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "`sliding_window` of 64"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "`yarn`"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "`factor`"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "`partial_rotary_fac"),
        ("llama", {"hidden_size": ...}, "`hidden_size`"),
        ("llama", {"vocab_size": "384"}, "`vocab_size`"),
        ("llama", {"num_hidden_layers": 0}, "`num_hidden_layers`"),
        ("llama", {"rms_norm_eps": ...}, "`rms_norm_eps`"),
        ("llama", {"num_key_value_heads": 3}, "`num_key_value_heads`"),
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 1}, "`num_key_value_heads`"),
        ("llama", {"head_dim": 15}, "`head_dim` of 15"),
    ],
)
def test_what_is_not_computed_exactly_is_refused_by_name(
    tiny_models: dict[str, Path], family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        DecoderConfig.from_json(values(tiny_models, family, **changes))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 1024}),  # as long as the context: nothing is ever cut off
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),  # named, but not used
        ("qwen3", {"sliding_window": None}),
    ],
)
def test_a_window_that_cuts_nothing_off_is_served(
    tiny_models: dict[str, Path], family: str, changes: dict[str, Any]
) -> None:
    assert DecoderConfig.from_json(values(tiny_models, family, **changes)).family == family


def test_older_files_keep_rope_outside_of_rope_parameters(tiny_models: dict[str, Path]) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}, "rope_parameters": ...}
    old["rope_scaling"].pop("rope_theta")  # type: ignore[attr-defined]
    config = DecoderConfig.from_json(values(tiny_models, "llama", **old))
    assert config.rope_theta == 5e5
    assert config.rope_scaling is not None
    assert config.rope_scaling["factor"] == 4.0


def test_rope_frequencies_equal_those_of_transformers(tiny_models: dict[str, Path]) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for family in ("llama", "mistral"):
        theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tiny_models[family])).inv_freq
        ours = inverse_frequencies(DecoderConfig.from_json(values(tiny_models, family)))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
