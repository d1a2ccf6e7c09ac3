"""Loading: a configuration in, a running engine out. The engine's composition root."""

from __future__ import annotations

import torch

from engine.adapters import load_adapters
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.grammar import Grammars
from engine.limits import EngineLimits
from engine.model_runner import (
    LinearByShape,
    ModelRunner,
    blocks_in,
    choose_linears,
    choose_segment,
    verify_adapters,
)
from engine.models.decoder import Decoder, DecoderConfig, parameter_shapes
from engine.numeric_policy import digest, numeric_policy
from engine.runtime import EngineRuntime, Report, RuntimeTimes
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.weights import digest_directory, load_parameters, read_json
from kernels.paged_attention import SEGMENTS


def load_engine(config: EngineConfig, report: Report | None = None) -> EngineRuntime:
    """Load the model and start the engine's thread. `report` is told of a step that is stuck or failed, and where.

    Raises: EngineStartError and its kinds: nothing was started; the message says what to do.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    version = digest_directory(config.model)
    tokenizer = Tokenizer(config.model)
    shape = DecoderConfig.from_json(read_json(config.model, "config.json"))
    segment = choose_segment(shape)
    linears = choose_linears(shape, config.max_tokens_per_step)
    parameters = load_parameters(config.model, parameter_shapes(shape))
    decoder = Decoder(shape, parameters, LinearByShape(linears), SEGMENTS[segment])
    loaded = load_adapters(config.adapters, shape, version)
    adapters = {name: one.adapter for name, one in loaded.items()}
    verify_adapters(adapters.values())
    core = EngineCore(
        ModelRunner(decoder, blocks_in(config.kv_cache_mib, shape), adapters),
        EngineLimits(
            context_length=min(config.context_length or shape.max_position_embeddings, shape.max_position_embeddings),
            vocabulary_size=shape.vocab_size,
            max_sequences=config.max_sequences,
            token_budget=config.max_tokens_per_step,
            chunk_tokens=config.max_tokens_per_step,
            waiting_limit=config.max_waiting,
            trial_rows=config.trial_rows,
            key_limit=config.max_per_key or -(-3 * (config.max_sequences + config.max_waiting) // 4),
        ),
        eos_ids=tokenizer.eos_ids,
        detokenizer_for=lambda sampling: IncrementalDetokenizer(tokenizer, sampling.stop),
        adapters=frozenset(adapters),
    )
    return EngineRuntime(
        core,
        tokenizer,
        version,
        digest(numeric_policy(linears, segment)),
        adapted=[one.version for one in loaded.values()],
        grammars=Grammars.of(tokenizer.json, shape.vocab_size, tokenizer.eos_ids),
        report=report,
        times=RuntimeTimes(stuck_after_s=config.stuck_after_s),
    )
