"""What the engine is told at start: frozen, every bad value named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MAX_ADAPTERS = 64
KV_CACHE_DTYPES = ("bfloat16", "fp8_e4m3")
DEVICE = re.compile(r"cpu|cuda(:(0|[1-9][0-9]{0,2}))?")

# EngineStartError        catch this: the engine does not start; the message says what to do
# ├── ConfigError         a value of EngineConfig
# ├── DeviceUnavailable   device.py: the device is not there, or cannot be used
# ├── WeightsError        reading.py: a file of the model's directory, or of an adapter's
# ├── AdapterError        adapters.py: an adapter, its files or what it asks for
# └── UnsupportedModel    an architecture or feature that cannot be served exactly


class EngineStartError(Exception):
    """The engine does not start."""


class ConfigError(EngineStartError):
    """Values of the configuration are out of range; all of them are named."""


class UnsupportedModel(EngineStartError):
    """The model cannot be served exactly."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: Path  # a directory in the Hugging Face layout
    device: str | None = None  # `cpu`, `cuda`, `cuda:N`; None: a GPU where torch finds one, else the CPU
    threads: int | None = None  # CPU threads, ≥ 1; None: as many as suit the weights
    compiled: bool = True  # whether the CPU's kernels are compiled at the start, where that can be done and suits
    kv_cache_mib: int = 256  # ≥ 1; memory for keys and values
    kv_cache_dtype: str = "bfloat16"  # one of KV_CACHE_DTYPES; each is a numeric policy of its own
    max_sequences: int = 64  # sequences in one step, ≥ 1
    max_tokens_per_step: int = 256  # ≥ max_sequences
    max_waiting: int = 256  # sequences that may wait, ≥ 0
    max_per_key: int | None = None  # sequences of one tenant in flight, ≥ 1; None: three quarters of all
    context_length: int | None = None  # ≥ 2; None: the model's own
    trial_rows: int = 16  # tokens of a step up to which some may be guesses, ≥ 0; 0: nothing is guessed
    stuck_after_s: float = 60.0  # > 0
    adapters: tuple[tuple[str, Path], ...] = ()  # name, PEFT directory; at most MAX_ADAPTERS, no name twice

    def __post_init__(self) -> None:
        least = {"kv_cache_mib": 1, "max_sequences": 1, "max_tokens_per_step": 1, "max_waiting": 0, "trial_rows": 0}
        wrong = [f"`{name}` must be at least {low}" for name, low in least.items() if getattr(self, name) < low]
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            wrong.append(f"`kv_cache_dtype` must be {' or '.join(f'`{name}`' for name in KV_CACHE_DTYPES)}")
        if self.device is not None and not DEVICE.fullmatch(self.device):
            wrong.append("`device` must be `cpu`, `cuda` or `cuda:N`")
        if self.threads is not None and self.threads < 1:
            wrong.append("`threads` must be at least 1")
        if self.max_per_key is not None and self.max_per_key < 1:
            wrong.append("`max_per_key` must be at least 1")
        if self.context_length is not None and self.context_length < 2:
            wrong.append("`context_length` must be at least 2")
        if self.max_tokens_per_step < self.max_sequences:
            wrong.append("`max_tokens_per_step` must be at least `max_sequences`")
        if not self.stuck_after_s > 0:
            wrong.append("`stuck_after_s` must be above 0")
        names = [name for name, _ in self.adapters]
        if len(names) > MAX_ADAPTERS:
            wrong.append(f"`adapters` must be at most {MAX_ADAPTERS}")
        wrong += [
            f"`adapters` names `{name}` twice" for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))
