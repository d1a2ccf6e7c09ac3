"""Loads a tiny model into a runner, and makes cores on it. The same parts as `engine.load`, without the thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from engine.core import EngineCore
from engine.model_runner import LinearByShape, ModelRunner, choose_linears, choose_segment
from engine.models.decoder import Adapted, Adapter, Decoder, DecoderConfig, KVCache, StepInputs, parameter_shapes
from engine.plan import BLOCK_SIZE
from engine.weights import load_parameters, read_json
from kernels.attention_plan import plan_attention
from kernels.paged_attention import SEGMENTS
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.engine_core import Ticks, make_limits

MOST_ROWS = 1024  # tokens of the widest step


@dataclass(frozen=True)
class LoadedModel:
    decoder: Decoder
    linears: dict[tuple[int, int], str]

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config


@cache
def load_model(directory: Path) -> LoadedModel:
    torch.set_num_threads(1)
    config = DecoderConfig.from_json(read_json(directory, "config.json"))
    linears = choose_linears(config, MOST_ROWS)
    parameters = load_parameters(directory, parameter_shapes(config))
    return LoadedModel(Decoder(config, parameters, LinearByShape(linears), SEGMENTS[choose_segment(config)]), linears)


def model_core(
    model: LoadedModel, blocks: int = 256, adapters: Mapping[str, Adapter] | None = None, **limits: int
) -> EngineCore:
    values = {"vocabulary_size": model.config.vocab_size, "context_length": model.config.max_position_embeddings}
    return EngineCore(
        ModelRunner(model.decoder, blocks, adapters),
        make_limits(**(values | {"token_budget": MOST_ROWS, "chunk_tokens": MOST_ROWS} | limits)),
        eos_ids=frozenset({EOS}),
        detokenizer_for=detokenizer_for,
        clock=Ticks(),
        adapters=frozenset(adapters or ()),
    )


@torch.inference_mode()
def logits_of(model: LoadedModel, prompts: list[list[int]], adapter: Adapter | None = None) -> list[torch.Tensor]:
    """Return the logits at every position of prompts computed in one step, each [T, V] float32."""
    tables, first = [], 0
    for prompt in prompts:
        count = -(-len(prompt) // BLOCK_SIZE)
        tables.append(list(range(first, first + count)))
        first += count
    width = max(map(len, tables))
    table = torch.tensor([[*row, *(0,) * (width - len(row))] for row in tables])
    sequence = torch.cat([torch.full((len(prompt),), index) for index, prompt in enumerate(prompts)])
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    slots = table[sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    config = model.config
    attention = plan_attention(
        table,
        sequence,
        positions,
        config.num_attention_heads,
        config.num_key_value_heads,
        BLOCK_SIZE,
        zero_slot=first * BLOCK_SIZE,
    )
    adapted = () if adapter is None else (Adapted(adapter, None),)
    inputs = StepInputs(tokens, positions, slots, attention, adapted)
    logits = model.decoder.logits(model.decoder.hidden(inputs, _caches(model.config, first)))
    return list(torch.split(logits, [len(prompt) for prompt in prompts]))


def _caches(config: DecoderConfig, blocks: int) -> list[KVCache]:
    """Return caches full of NaN, the zero block aside: what is read without having been written shows."""
    shape = (blocks + 1, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    return [KVCache(_poisoned(shape), _poisoned(shape)) for _ in range(config.num_hidden_layers)]


def _poisoned(shape: tuple[int, ...]) -> torch.Tensor:
    cache = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    cache[-1] = 0
    return cache
