"""Small random models of the four families, and runners on them: by the CPU's arithmetic and by the kernels.

Nothing is read from a disk, so that torch and triton are enough. In the interpreter the models are as small as they can
be and products are given, not chosen: to try them takes it minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.core import EngineCore
from engine.device import ATTENTION, CPU, choose_attention, choose_products
from engine.device_runner import DeviceRunner
from engine.model_runner import LinearByShape, ModelRunner, choose_linears, choose_segment
from engine.models.arithmetic import Adapter
from engine.models.cpu_arithmetic import CpuArithmetic
from engine.models.decoder import ARCHITECTURES, Decoder, DecoderConfig, parameter_shapes, product_parts
from engine.models.triton_arithmetic import DeviceInputs, TritonArithmetic
from engine.plan import Runner
from kernels.low_rank import LowRank
from kernels.paged_attention import SEGMENTS
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.engine_core import Ticks, make_limits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOST_ROWS = 1024  # tokens of the widest step
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256.0}


@dataclass(frozen=True)
class Sizes:
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    head: int


TINY = Sizes(vocab=101, hidden=32, inner=40, layers=1, heads=4, groups=2, head=16)  # for the interpreter
SMALL = Sizes(vocab=1003, hidden=256, inner=704, layers=3, heads=8, groups=2, head=64)


def config_of(family: str, sizes: Sizes, positions: int = 1024) -> DecoderConfig:
    """Together they use every feature: both rope kinds, tied and not, bias, head norms."""
    return DecoderConfig(
        family=family,
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=2 if family == "llama" else sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups if family == "qwen3" else 1,
        head_dim=sizes.head,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        rope_scaling=LLAMA3 if family == "llama" else None,
        max_position_embeddings=positions,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_word_embeddings=family == "qwen2",
    )


def parameters_of(config: DecoderConfig) -> dict[str, Tensor]:
    """Drawn wider than at the start of a training, so that the next token depends on those before it."""
    generator = torch.Generator().manual_seed(0)
    return {name: _draw(name, shape, generator).bfloat16() for name, shape in parameter_shapes(config).items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias") or "embed" in name:
        return 0.5 * noise
    return noise * (4.0 if "lm_head" in name else 1.3) / shape[1] ** 0.5


def adapter_of(config: DecoderConfig, seed: int, rank: int, products: tuple[str, ...]) -> Adapter:
    """Return an adapter of some products of every layer, drawn wide."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"o": config.qkv_sizes[0], "down": config.intermediate_size}

    def low_rank(product: str, outputs: int) -> LowRank:
        depth = inputs.get(product, config.hidden_size)
        down = torch.randn(rank, depth, generator=generator) / depth**0.5
        up = torch.randn(outputs, rank, generator=generator) / rank**0.5
        return LowRank(down.bfloat16(), up.bfloat16())

    sizes = {name: sum(size for _, size in parts) for name, parts in product_parts(config).items()}
    layer = [{name: low_rank(name, sizes[name]) for name in products} for _ in range(config.num_hidden_layers)]
    return Adapter(tuple(layer))


def write_parameters(directory: Path, family: str, sizes: Sizes) -> None:
    """Write what a model is loaded from, but for its tokenizer: `config.json` in the words of Hugging Face."""
    config = config_of(family, sizes)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    values = {name: getattr(config, name) for name in names}
    values["architectures"] = [next(name for name, known in ARCHITECTURES.items() if known == family)]
    (directory / "config.json").write_text(json.dumps(values))
    save_file(parameters_of(config), directory / "model.safetensors")


@dataclass(frozen=True, eq=False)
class OnDevice:
    config: DecoderConfig
    decoder: Decoder[DeviceInputs]
    arithmetic: TritonArithmetic
    chosen: Mapping[str, str]

    def runner(self, blocks: int, adapters: Mapping[str, Adapter] | None = None) -> DeviceRunner:
        return DeviceRunner(self.decoder, self.arithmetic, blocks, adapters)


@cache
def on_device(family: str, device: torch.device) -> OnDevice:
    interpreted = device == CPU
    config = config_of(family, TINY if interpreted else SMALL)
    if interpreted:
        products, attention = dict.fromkeys(config.linear_shapes(), "triton"), "decode_and_prefill"
    else:
        products = choose_products(config, MOST_ROWS, device)
        attention = choose_attention(config, device)
    arithmetic = TritonArithmetic(device, products, ATTENTION[attention])
    named = {f"{rows}x{columns}": name for (rows, columns), name in products.items()}
    return OnDevice(config, Decoder(config, parameters_of(config), arithmetic), arithmetic, named)


def cpu_runner(config: DecoderConfig, blocks: int, adapters: Mapping[str, Adapter] | None = None) -> ModelRunner:
    torch.set_num_threads(1)
    linear = LinearByShape(choose_linears(config, 128))
    arithmetic = CpuArithmetic(linear, SEGMENTS[choose_segment(config)], linear.pack)
    return ModelRunner(Decoder(config, parameters_of(config), arithmetic), blocks, adapters)


def core_on(
    runner: Runner, config: DecoderConfig, adapters: Mapping[str, Adapter] | None = None, **limits: int
) -> EngineCore:
    values = {"vocabulary_size": config.vocab_size, "context_length": config.max_position_embeddings}
    return EngineCore(
        runner,
        make_limits(**(values | {"token_budget": MOST_ROWS, "chunk_tokens": MOST_ROWS} | limits)),
        eos_ids=frozenset({EOS} if config.vocab_size > EOS else {2}),
        detokenizer_for=detokenizer_for,
        clock=Ticks(),
        adapters=frozenset(adapters or ()),
    )
