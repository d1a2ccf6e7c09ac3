"""Loading: a configuration in, an engine out, running or about to. The engine's composition root."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from engine.adapters import LoadedAdapter, load_adapters
from engine.config import EngineConfig, UnsupportedModel
from engine.core import EngineCore
from engine.device import CPU, open_device
from engine.grammar import Grammars
from engine.limits import EngineLimits
from engine.model_loading import DeviceModel, LoadedModel, load_device_model, load_model
from engine.model_runner import blocks_in
from engine.models.decoder import DecoderConfig
from engine.models.model import ModelShape
from engine.numeric_policy import digest, with_kv_cache
from engine.reading import KeptFiles, Progress, Reading, silently
from engine.request import ModelVersion
from engine.runtime import EngineRuntime, Report, RuntimeTimes, Served
from engine.step_thread import StepThread
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.weights import read_model, version_of, weights_size

SMALL_BYTES = 100_000_000  # of weights, up to which one CPU is left to the gateway


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """What a step thread needs, and what is told of it."""

    core: EngineCore
    grammars: Grammars | None
    tokenizer: Tokenizer
    files: KeptFiles  # that the tokenizer was made of
    served: Served


def load_engine(config: EngineConfig, report: Report | None = None, progress: Progress = silently) -> EngineRuntime:
    """Load the model and start the engine's thread. `report` is told of a step that is stuck or failed, and where.

    engine_process.py does the same in a process of its own.

    Raises: as `load`.
    """
    loaded = load(config, progress)
    return EngineRuntime(
        lambda tell: StepThread(loaded.core, tell, grammars=loaded.grammars),
        loaded.tokenizer,
        loaded.served,
        report=report,
        times=RuntimeTimes(stuck_after_s=config.stuck_after_s),
    )


def load(config: EngineConfig, progress: Progress = silently) -> LoadedEngine:
    """Load the model. `progress` is told how far the files are read.

    What is parsed is what was hashed: no file is read a second time.

    Raises: EngineStartError and its kinds: nothing was started; the message says what to do.
    """
    device = open_device(config.device)
    reading = read_model(config.model, progress)
    torch.set_num_threads(config.threads or _threads(weights_size(reading)))
    tokenizer = Tokenizer(reading)
    loaded = _load(reading, config, device)
    version = replace(version_of(reading), cast=loaded.cast)
    shape = loaded.config
    adapted = _adapters(config, shape, version, progress)
    adapters = {name: one.adapter for name, one in adapted.items()}
    core = EngineCore(
        loaded.runner(blocks_in(config.kv_cache_mib, shape, config.kv_cache_dtype), adapters, config.kv_cache_dtype),
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
    return LoadedEngine(
        core,
        Grammars.of(tokenizer.json, shape.vocab_size, tokenizer.eos_ids),
        tokenizer,
        reading.kept(),
        Served(
            version,
            tuple(one.version for one in adapted.values()),
            digest(with_kv_cache(loaded.policy, config.kv_cache_dtype)),
            core.limits,
            core.scheduler.pool.total,
            core.metrics(),
        ),
    )


def _threads(weights: int) -> int:
    """Return how many threads compute where nobody says so, for weights of so many bytes.

    Threads that work on one product wait for each other, and for the gateway where it takes the CPU of one. That costs
    a small model more than it gains, and a large one less, which is read at the speed of all CPUs together. Seen on two
    CPUs, with torch's kernels, for 8 and 32 sequences: one thread was faster for 10 MB, and for 774 MB slower or equal.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cpus if weights > SMALL_BYTES else max(1, cpus - 1)


def _load(reading: Reading, config: EngineConfig, device: torch.device) -> LoadedModel | DeviceModel:
    if device == CPU:
        return load_model(reading, config.max_tokens_per_step, config.context_length, config.compiled)
    return load_device_model(reading, config.max_tokens_per_step, device, config.kv_cache_dtype)


def _adapters(
    config: EngineConfig, shape: ModelShape, version: ModelVersion, progress: Progress
) -> dict[str, LoadedAdapter]:
    if not config.adapters:
        return {}
    if not isinstance(shape, DecoderConfig):
        raise UnsupportedModel("`adapters` are served beside Llama, Mistral, Qwen2 and Qwen3 alone")
    return load_adapters(config.adapters, shape, version, progress)
