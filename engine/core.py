"""EngineCore: add, step, abort. Synchronous and single-threaded; whoever holds it calls it from one thread.

step = plan (scheduler) → run (runner) → commit (scheduler) → read (generation: text, stop, digest)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from engine.blocks import BlockPool, Finding
from engine.generation import DetokenizerFor, Generation
from engine.grammar import Start
from engine.limits import EngineLimits
from engine.metrics import EngineMetrics
from engine.plan import Runner, StepInterrupted, StepPlan, StepResult
from engine.request import FinishReason, GenerationFailed, GenerationRequest, RequestRefused, TokenDelta
from engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step, or an abort, added to one request."""

    request_id: str
    delta: TokenDelta
    failure: GenerationFailed | None = None  # the request ended with this, after the delta

    def __reduce__(self) -> tuple[type[Emission], tuple[object, ...]]:
        """Told to another process many a time a step: three times as fast as what a dataclass does by itself."""
        return Emission, (self.request_id, self.delta, self.failure)


class EngineCore:
    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits,
        *,
        eos_ids: frozenset[int],
        detokenizer_for: DetokenizerFor,
        clock: Callable[[], float] = time.monotonic,
        adapters: frozenset[str] = frozenset(),  # those that the runner has
    ) -> None:
        self.limits = limits
        self._adapters = adapters
        self.scheduler = Scheduler(limits, BlockPool(runner.block_count), eos_ids)
        self._runner = runner
        self._detokenizer_for = detokenizer_for
        self._clock = clock
        self._generations: dict[str, Generation] = {}
        self._steps = 0
        self._interrupted_steps = 0
        self._computed_tokens = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished: Counter[FinishReason] = Counter()

    @property
    def has_work(self) -> bool:
        return bool(self._generations)

    def add(self, request: GenerationRequest, start: Start | None = None) -> None:
        """Queue `request`; its deltas come out of later steps. With a structure, `start` gives its output a state.

        Raises: ContextTooLong, RequestRefused, EngineOverloaded; nothing was queued.
        """
        if request.request_id in self._generations:
            raise RequestRefused("`request_id` is already in flight; use a new one", "request_id")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise RequestRefused("`adapter` is not loaded", "adapter")  # and would be missed in the middle of a step
        detokenizer = self._detokenizer_for(request.sampling)
        if (request.sampling.structure is None) != (start is None):
            raise RequestRefused("`structure` was not compiled", "structure")
        sequence = self.scheduler.add(request, start() if start is not None else None)
        self._generations[request.request_id] = Generation(
            sequence, detokenizer, context_length=self.limits.context_length, arrived_at=self._clock()
        )

    def abort(self, request_id: str) -> Emission | None:
        """End a request wherever it stands and free its blocks. Returns None if it is not in flight (any more)."""
        generation = self._generations.get(request_id)
        if generation is None:
            return None
        delta = generation.abort(self._clock())
        self._end(generation, FinishReason.ABORT)
        return Emission(request_id, delta)

    def reset_cache(self, cache_salt: bytes) -> None:
        """Let nothing be found again that was cached under a salt."""
        self.scheduler.pool.forget(cache_salt)

    def step(self, poll: Callable[[], None] = lambda: None) -> list[Emission]:
        """Carry out one step; return what it added, at most one emission per request. Empty when nothing is in flight.

        `poll` is called between layers. It may `add`, and nothing else: a step is given up, and empty, if who came then
        is owed a place by those it serves.

        What the runner raises comes through: the contents of the cache are then unknown and the engine must not go on.
        """
        plan = self.scheduler.plan()
        if plan is None:
            return []
        self._note_admitted()

        def interrupted() -> bool:
            poll()
            return self.scheduler.gives_way

        try:
            result = self._runner.run(plan, interrupted)
        except StepInterrupted:
            self.scheduler.drop_plan()
            self._interrupted_steps += 1
            return []
        return self._taken(plan, result)

    def _taken(self, plan: StepPlan, result: StepResult) -> list[Emission]:
        now = self._clock()
        self._steps += 1
        self._computed_tokens += plan.token_count
        emissions = []
        for sequence, tokens in self.scheduler.commit(result):
            generation = self._generations[sequence.request.request_id]
            if generation.output_tokens == 0:  # the first
                self._prompt_tokens += sequence.prompt_length
            pooled = sequence.pooled if sequence.request.pooling is not None else None
            delta = generation.accept(tokens, now) if pooled is None else generation.embed(pooled, now)
            self._generation_tokens += len(delta.tokens)
            failure = None
            if delta.finish_reason is not None:
                self._end(generation, delta.finish_reason)
            elif sequence.failed:
                failure = GenerationFailed("the structure of the output became too complex to be enforced; simplify it")
                self._end(generation, FinishReason.ABORT)
            emissions.append(Emission(sequence.request.request_id, delta, failure))
        return emissions

    def _note_admitted(self) -> None:
        if self.scheduler.admitted:
            now = self._clock()
            for sequence in self.scheduler.admitted:
                self._generations[sequence.request.request_id].admitted(now)

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        self.scheduler.finish(generation.sequence)
        self._finished[reason] += 1
        del self._generations[generation.sequence.request.request_id]

    def metrics(self) -> EngineMetrics:
        """Cost: O(running sequences)."""
        pool, counters = self.scheduler.pool, self.scheduler.counters
        return EngineMetrics(
            running=self.scheduler.running,
            waiting=self.scheduler.waiting,
            free_blocks=pool.free,
            cached_blocks=pool.cached,
            used_blocks=pool.used,
            unfilled_slots=self.scheduler.unfilled_slots(),
            steps=self._steps,
            interrupted_steps=self._interrupted_steps,
            computed_tokens=self._computed_tokens,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=counters.preemptions,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            finished_stop=self._finished[FinishReason.STOP],
            finished_length=self._finished[FinishReason.LENGTH],
            finished_abort=self._finished[FinishReason.ABORT],
        )

    def check_integrity(self) -> tuple[Finding, ...]:
        """Return what does not add up; empty means sound. Cost: O(blocks + tokens in flight / BLOCK_SIZE)."""
        return self.scheduler.check_integrity()
