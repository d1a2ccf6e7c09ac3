from __future__ import annotations

import pytest

from engine.metrics import EngineMetrics
from tests.support.engine_core import make_core, make_prompt, make_request, run_all


def test_ratios_of_an_empty_engine_are_zero() -> None:
    assert (EngineMetrics().kv_usage, EngineMetrics().kv_waste) == (0.0, 0.0)


def test_waste_is_unfilled_slots_in_allocated_ones() -> None:
    metrics = EngineMetrics(free_blocks=2, cached_blocks=1, used_blocks=5, unfilled_slots=20)
    assert metrics.kv_usage == pytest.approx(5 / 8)
    assert metrics.kv_waste == pytest.approx(20 / 80)


def test_counters_add_up_over_a_run_with_cache_hits_and_preemptions() -> None:
    core = make_core(16, token_budget=32, max_sequences=8, chunk_tokens=32)
    requests = [make_request(str(number), make_prompt(50, number % 2), 20, seed=number) for number in range(12)]
    outputs = run_all(core, requests)
    metrics = core.metrics()
    assert metrics.generation_tokens == sum(len(output.tokens) for output in outputs.values())
    assert metrics.prompt_tokens == metrics.prefix_cache_queries == 600
    assert metrics.prefix_cache_hits == sum(output.stats.cached_tokens for output in outputs.values() if output.stats)
    assert metrics.prefix_cache_hits > 0
    assert metrics.preemptions == sum(output.stats.preemptions for output in outputs.values() if output.stats)
    assert metrics.finished_length + metrics.finished_stop == 12
    assert (metrics.running, metrics.waiting, metrics.used_blocks) == (0, 0, 0)
