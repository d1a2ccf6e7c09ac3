"""What the engine counts: plain numbers, for the gateway to publish under `probity_` with vLLM's names.

Counters only grow, from 0 at start; gauges are true at the moment of the snapshot. Counts are of tokens unless they say
otherwise. No request, tenant or content ever appears here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter

from engine.plan import BLOCK_SIZE


@dataclass(slots=True)
class SchedulerCounters:
    """What the scheduler adds to as it goes; read by `EngineMetrics`."""

    preemptions: int = 0  # sequences
    prefix_cache_queries: int = 0  # prompt tokens looked up, once per request
    prefix_cache_hits: int = 0  # of those, found


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    # gauges
    running: int = 0  # sequences
    waiting: int = 0  # sequences
    free_blocks: int = 0
    cached_blocks: int = 0
    used_blocks: int = 0
    unfilled_slots: int = 0  # KV slots in used blocks that hold nothing yet
    # counters
    steps: int = 0
    interrupted_steps: int = 0  # given up for who came meanwhile, and not among `steps`
    computed_tokens: int = 0  # by the model, prefill, recomputation and decode together
    prompt_tokens: int = 0  # of requests that produced their first token
    generation_tokens: int = 0
    preemptions: int = 0  # sequences
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    finished_stop: int = 0  # requests
    finished_length: int = 0  # requests
    finished_abort: int = 0  # requests
    integrity_findings: int = 0  # reported by checks when idle; 0 in a sound engine

    def __reduce__(self) -> tuple[type[EngineMetrics], tuple[object, ...]]:
        """As `core.Emission`'s: told to another process with every step."""
        return EngineMetrics, _values(self)

    @property
    def kv_usage(self) -> float:
        """Used blocks in all, 0 … 1."""
        total = self.free_blocks + self.cached_blocks + self.used_blocks
        return self.used_blocks / total if total else 0.0

    @property
    def kv_waste(self) -> float:
        """Allocated but unfilled KV slots in all allocated ones, 0 … 1."""
        return self.unfilled_slots / (self.used_blocks * BLOCK_SIZE) if self.used_blocks else 0.0


_values = attrgetter(*(field.name for field in fields(EngineMetrics)))
