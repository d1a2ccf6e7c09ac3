"""Loads a tiny model into a runner, and makes cores on it. What `engine.load` does, without the thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from engine import model_loading as load
from engine.core import EngineCore
from engine.model_runner import CACHED_AS, ModelRunner
from engine.models.arithmetic import Adapter, KVCache
from engine.models.cpu_arithmetic import Adapted
from engine.models.model import Model, ModelShape
from engine.plan import BLOCK_SIZE, RowPlan
from engine.reading import Reading
from engine.request import SamplingParams
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.engine_core import Ticks, make_limits

MOST_ROWS = 1024  # tokens of the widest step


@dataclass(frozen=True)
class LoadedModel:
    decoder: Model

    @property
    def config(self) -> ModelShape:
        return self.decoder.config


@cache
def load_model(directory: Path, compiled: bool = True) -> LoadedModel:
    torch.set_num_threads(1)
    return LoadedModel(load.load_model(Reading(directory), MOST_ROWS, compiled=compiled).model)


def model_core(
    model: LoadedModel,
    blocks: int = 256,
    adapters: Mapping[str, Adapter] | None = None,
    runner: ModelRunner | None = None,
    kv_cache_dtype: str = "bfloat16",
    **limits: int,
) -> EngineCore:
    values = {"vocabulary_size": model.config.vocab_size, "context_length": model.config.max_position_embeddings}
    return EngineCore(
        runner or ModelRunner(model.decoder, blocks, adapters, kv_cache_dtype),
        make_limits(**(values | {"token_budget": MOST_ROWS, "chunk_tokens": MOST_ROWS} | limits)),
        eos_ids=frozenset({EOS}),
        detokenizer_for=detokenizer_for,
        clock=Ticks(),
        adapters=frozenset(adapters or ()),
    )


@torch.inference_mode()
def logits_of(
    model: LoadedModel, prompts: list[list[int]], adapter: Adapter | None = None, kv_cache_dtype: str = "bfloat16"
) -> list[torch.Tensor]:
    """Return the logits at every position of prompts computed in one step, each [T, V] float32."""
    rows, first = [], 0
    for prompt in prompts:
        blocks = range(first, first := first + -(-len(prompt) // BLOCK_SIZE))
        rows.append(RowPlan(tuple(prompt), 0, tuple(blocks), SamplingParams(max_tokens=1, seed=0), ()))
    inputs = ModelRunner(model.decoder, first).inputs(rows)
    if adapter is not None:
        inputs = replace(inputs, adapted=(Adapted(adapter, None),))
    caches = _caches(model.config, first, CACHED_AS[kv_cache_dtype])
    logits = model.decoder.logits(model.decoder.hidden(inputs, caches))
    return list(torch.split(logits, [len(prompt) for prompt in prompts]))


def _caches(config: ModelShape, blocks: int, dtype: torch.dtype) -> list[KVCache]:
    """Return caches full of NaN, the zero block aside: what is read without having been written shows."""
    shape = (blocks + 1, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    return [KVCache(_poisoned(shape, dtype), _poisoned(shape, dtype)) for _ in range(config.num_hidden_layers)]


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    cache = torch.full(shape, torch.nan, dtype=dtype)
    cache[-1] = 0
    return cache
