from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, EngineConfig

MODEL = Path("model")


def test_the_defaults_hold() -> None:
    assert EngineConfig(MODEL).max_tokens_per_step >= EngineConfig(MODEL).max_sequences


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0),
        ("kv_cache_mib", 0),
        ("kv_cache_dtype", "fp8"),
        ("kv_cache_dtype", ""),
        ("max_sequences", 0),
        ("max_tokens_per_step", 63),
        ("max_waiting", -1),
        ("context_length", 1),
        ("adapters", (("twice", MODEL), ("once", MODEL), ("twice", MODEL))),
        ("adapters", tuple((str(index), MODEL) for index in range(65))),
        ("stuck_after_s", 0.0),
        ("stuck_after_s", float("nan")),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`"):
        EngineConfig(MODEL, **{name: value})


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        EngineConfig(MODEL, threads=-1, kv_cache_mib=-5, stuck_after_s=-1.0, context_length=0)
    assert all(f"`{name}`" in str(refused.value) for name in ("threads", "kv_cache_mib", "stuck_after_s"))
    assert "`context_length`" in str(refused.value)
