"""Llama, Mistral, Qwen2 and Qwen3, by configuration: one decoder, names as in Hugging Face.

    embed ▶ [norm ▶ qkv ▶ (q, k norm) ▶ rope ▶ store ▶ attention ▶ o ▶ norm ▶ gate·up ▶ down] ▶ norm ▶ logits

What differs between them is a bias on qkv (Qwen2), a norm on each head (Qwen3), the rope scaling. A feature that is not
computed exactly here is refused when the configuration is read, by name. Layers take the step's inputs as an argument;
nothing is global. q, k, v and gate, up are one product each. An adapter adds to the products of a layer, for the tokens
that are its own; the logits have none. What all of it is computed with, and where, arithmetic.py says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import UnsupportedModel
from engine.models.arithmetic import Arithmetic, Inputs, KVCache, LayerProduct, Rotation
from kernels.attention_plan import ROWS
from kernels.rope_store import HeadNorm

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The members of `config.json` that the arithmetic depends on."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, float] | None  # llama3: factor, low_freq_factor, high_freq_factor, original_max_…
    max_position_embeddings: int
    qkv_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Read a Hugging Face configuration.

        Raises:
            UnsupportedModel: an architecture, or a feature of it, that is not computed exactly here.
        """
        architecture = (values.get("architectures") or ["none"])[0]
        family = ARCHITECTURES.get(architecture)
        if family is None:
            raise UnsupportedModel(f"`{architecture}` is not served; there are {', '.join(ARCHITECTURES)}")
        _refuse_missing(values)
        _refuse_features(values, family)
        _refuse_heads(values)
        rope_parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
        heads = values["num_attention_heads"]
        return cls(
            family=family,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            rms_norm_eps=values["rms_norm_eps"],
            rope_theta=rope_parameters.get("rope_theta") or values.get("rope_theta") or 10_000.0,
            rope_scaling=_scaling(rope_parameters),
            max_position_embeddings=values["max_position_embeddings"],
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        )

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        return (
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
        )

    @property
    def windows(self) -> tuple[int, ...]:
        return ()  # a window that cuts anything off is refused

    def linear_shapes(self) -> list[tuple[int, int]]:
        """Return the (N, K) of every product of a layer and of the logits."""
        return [
            (sum(self.qkv_sizes), self.hidden_size),
            (self.hidden_size, self.qkv_sizes[0]),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
            (self.vocab_size, self.hidden_size),
        ]


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _refuse_missing(values: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if type(values.get(name)) is not int or values[name] < 1:
            raise UnsupportedModel(f"`{name}` of `config.json` must be a whole number of at least 1")
    if not isinstance(values.get("rms_norm_eps"), float):
        raise UnsupportedModel("`rms_norm_eps` of `config.json` must be a number")


def _refuse_heads(values: Mapping[str, Any]) -> None:
    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads") or heads
    size = values.get("head_dim") or values["hidden_size"] // heads
    if heads % groups or heads // groups > ROWS:
        raise UnsupportedModel(f"`num_key_value_heads` must divide `num_attention_heads`, into at most {ROWS} each")
    if size % 2:
        raise UnsupportedModel(f"`head_dim` of {size} is odd; rotary positions need an even one")


def _refuse_features(values: Mapping[str, Any], family: str) -> None:
    if values.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel("`hidden_act` is not `silu`")
    if values.get("quantization_config"):
        raise UnsupportedModel("`quantization_config`: quantized weights are not served")
    window = values.get("sliding_window")
    uses_window = family == "mistral" or values.get("use_sliding_window")
    if uses_window and window is not None and window < values["max_position_embeddings"]:
        raise UnsupportedModel(f"`sliding_window` of {window} is shorter than the context and is not served")
    rotary = values.get("rope_parameters") or {}
    if rotary.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("`partial_rotary_factor` is not served")
    if values.get("mlp_bias") or (values.get("attention_bias") and family != "qwen2"):
        raise UnsupportedModel("`mlp_bias` and `attention_bias` are not served")


def _scaling(parameters: Mapping[str, Any]) -> Mapping[str, float] | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedModel(f"`rope_type` `{kind}` is not served")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if not isinstance(parameters.get(name), int | float)]
    if missing:
        raise UnsupportedModel(f"`rope_type` `llama3` needs `{missing[0]}` in `config.json`")
    return {name: float(parameters[name]) for name in names}


def inverse_frequencies(config: DecoderConfig) -> Tensor:
    """Return the angle a position adds, by pair, [D/2] float32. Source: Hugging Face's `llama3` rope scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelength > length / low, frequencies / factor, frequencies)
    between = (wavelength <= length / low) & (wavelength >= length / high)
    return torch.where(between, blended, scaled)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's parameters, fused where one product reads them."""

    input_norm: Tensor
    qkv: LayerProduct
    head_norm: HeadNorm | None
    o: LayerProduct
    post_norm: Tensor
    gate_up: LayerProduct
    down: LayerProduct


class Decoder(Generic[Inputs]):
    """The parameters, and the way from tokens to logits."""

    def __init__(self, config: DecoderConfig, parameters: Mapping[str, Tensor], arithmetic: Arithmetic[Inputs]) -> None:
        """Take the parameters by their Hugging Face names; weights.py has checked that they are exactly these."""
        self.config = config
        self._arithmetic = arithmetic
        self._embedding = arithmetic.hold(parameters["model.embed_tokens.weight"])
        self._layers = [_layer(config, parameters, index, arithmetic) for index in range(config.num_hidden_layers)]
        self._norm = arithmetic.hold(parameters["model.norm.weight"])
        head = self._embedding if config.tie_word_embeddings else parameters["lm_head.weight"]
        self._head = arithmetic.lay_out(head)
        angles = torch.arange(config.max_position_embeddings).float()[:, None] * inverse_frequencies(config)
        self._rotation = Rotation(arithmetic.hold(angles.cos()), arithmetic.hold(angles.sin()))

    def hidden(self, inputs: Inputs, caches: list[KVCache]) -> Tensor:
        """Return the hidden states, [T, H]; keys and values are stored on the way."""
        rotation = self._arithmetic.rotation(inputs, self._rotation)
        embedded = F.embedding(inputs.tokens, self._embedding)
        return self._arithmetic.through(self._through_layers, inputs, rotation, embedded, caches)

    def _through_layers(
        self, inputs: Inputs, rotation: Rotation, residual: Tensor, caches: Sequence[KVCache]
    ) -> Tensor:
        compute, epsilon = self._arithmetic, self.config.rms_norm_eps
        normed = compute.norm(residual, self._layers[0].input_norm, epsilon)
        for index, layer in enumerate(self._layers):
            inputs.give_way()
            attended = self._attention(layer, normed, inputs, rotation, caches[index])
            normed, residual = compute.add_norm(attended, residual, layer.post_norm, epsilon)
            inputs.give_way()
            fed = self._feed(layer, normed, inputs)
            last = index + 1 == len(self._layers)
            weight = self._norm if last else self._layers[index + 1].input_norm
            normed, residual = compute.add_norm(fed, residual, weight, epsilon)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] float32 of hidden states [R, H]."""
        if hidden.shape[0] == 0:  # a chunk of a long prompt by itself: only keys and values were wanted
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return self._arithmetic.linear(hidden, self._head).float()

    def _attention(self, layer: Layer, normed: Tensor, inputs: Inputs, rotation: Rotation, cache: KVCache) -> Tensor:
        compute = self._arithmetic
        fused = compute.product(inputs, layer.qkv, normed)
        query = compute.rotate_and_store(inputs, fused, layer.head_norm, rotation, cache)
        inputs.give_way()
        attended = compute.attention(inputs, query, cache, self.config.head_dim**-0.5)
        return compute.product(inputs, layer.o, attended.reshape(len(normed), -1))

    def _feed(self, layer: Layer, normed: Tensor, inputs: Inputs) -> Tensor:
        inner = self._arithmetic.gated_product(inputs, layer.gate_up, normed)
        inputs.give_way()
        return self._arithmetic.product(inputs, layer.down, inner)


def _layer(
    config: DecoderConfig, parameters: Mapping[str, Tensor], index: int, arithmetic: Arithmetic[Inputs]
) -> Layer:
    prefix = f"model.layers.{index}"

    def norm(name: str) -> Tensor:
        return arithmetic.hold(parameters[f"{prefix}.{name}.weight"])

    def fused(kind: str, modules: list[str]) -> Tensor:
        parts = [parameters[f"{prefix}.{module}.{kind}"] for module in modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def product(name: str) -> LayerProduct:
        modules = [module for module, _ in parts[name]]
        bias = arithmetic.hold(fused("bias", modules)) if name == "qkv" and config.qkv_bias else None
        return LayerProduct(index, name, arithmetic.lay_out(fused("weight", modules)), bias)

    parts = product_parts(config)
    head_norm = None
    if config.qk_norm:
        head_norm = HeadNorm(norm("self_attn.q_norm"), norm("self_attn.k_norm"), config.rms_norm_eps)
    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=product("qkv"),
        head_norm=head_norm,
        o=product("o"),
        post_norm=norm("post_attention_layernorm"),
        gate_up=product("gate_up"),
        down=product("down"),
    )


def product_parts(config: DecoderConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """Return which modules each product of a layer computes, by name in the layer, in order, with their outputs."""
    query, key, value = config.qkv_sizes
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (("self_attn.q_proj", query), ("self_attn.k_proj", key), ("self_attn.v_proj", value)),
        "o": (("self_attn.o_proj", hidden),),
        "gate_up": (("mlp.gate_proj", inner), ("mlp.up_proj", inner)),
        "down": (("mlp.down_proj", hidden),),
    }


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter that a checkpoint of this configuration holds, by name, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        for part, size in zip("qkv", config.qkv_sizes, strict=True):
            shapes[f"{prefix}.self_attn.{part}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}.self_attn.{part}_proj.bias"] = (size,)
        if config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, config.qkv_sizes[0])
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes
