"""KV waste: allocated KV slots that hold nothing, in all allocated slots, on ShareGPT-like lengths.

    python -m tests.benchmarks.bench_kv_waste

The scheduler is the real one; the runner computes digests on a paged cache, since waste depends on lengths alone.
Lengths are lognormal with the means of ShareGPT-like traffic (220 in, 200 out). Waste is sampled after every step and
weighted by the slots allocated then. Beside it stands what one contiguous reservation per request would waste on the
same requests at the same moments: of the whole context length, and of exactly prompt + max_tokens. Also printed: what
scheduling costs per step, the runner's time taken out.

Source of the lengths and of the claim to meet (< 4 % where others waste 60–80 %): Kwon et al., SOSP 2023.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass

from engine.core import EngineCore
from engine.plan import BLOCK_SIZE, Interrupted, StepPlan, StepResult, never
from engine.request import GenerationRequest
from tests.benchmarks.machine import describe_machine
from tests.support.engine_core import make_core, make_request
from tests.support.paged_runner import PagedRunner

CONTEXT_LENGTH = 2048


@dataclass
class Waste:
    """Slot-steps: allocated and unfilled slots, summed over steps."""

    paged: int = 0
    paged_unfilled: int = 0
    exact: int = 0
    whole: int = 0
    filled: int = 0
    steps: int = 0
    rows: int = 0
    scheduling_s: float = 0.0


class TimedRunner(PagedRunner):
    spent_s = 0.0

    def run(self, plan: StepPlan, interrupted: Interrupted = never) -> StepResult:
        start = time.perf_counter()
        result = super().run(plan, interrupted)
        self.spent_s += time.perf_counter() - start
        return result


def lognormal(rng: random.Random, mean: float, sigma: float, least: int, most: int) -> int:
    drawn = math.exp(rng.gauss(math.log(mean) - sigma * sigma / 2, sigma))
    return max(least, min(most, round(drawn)))


def build_requests(count: int) -> list[GenerationRequest]:
    requests = []
    for index in range(count):
        rng = random.Random(f"0/{index}")
        prompt = lognormal(rng, 220, 0.8, 8, 1024)
        output = lognormal(rng, 200, 0.7, 8, 512)
        tokens = [rng.randrange(50_000) for _ in range(prompt)]
        requests.append(make_request(str(index), tokens, output, ignore_eos=True, logprobs=False))
    return requests


def measure(concurrency: int, requests: list[GenerationRequest]) -> Waste:
    """Keep `concurrency` requests in flight until all are done."""
    blocks = concurrency * CONTEXT_LENGTH // BLOCK_SIZE // 2
    runner = TimedRunner(max(blocks, CONTEXT_LENGTH // BLOCK_SIZE))
    core = make_core(runner=runner, max_sequences=concurrency, context_length=CONTEXT_LENGTH, token_budget=512)
    waste = Waste()
    waiting = list(reversed(requests))
    while waiting or core.has_work:
        while waiting and core.metrics().running + core.metrics().waiting < concurrency:
            core.add(waiting.pop())
        before = runner.spent_s
        start = time.perf_counter()
        core.step()
        waste.scheduling_s += time.perf_counter() - start - (runner.spent_s - before)
        waste.rows += len(runner.latest.rows) if runner.latest else 0
        observe(core, waste)
    return waste


def observe(core: EngineCore, waste: Waste) -> None:
    metrics = core.metrics()
    waste.steps += 1
    waste.paged += metrics.used_blocks * BLOCK_SIZE
    waste.paged_unfilled += metrics.unfilled_slots
    for sequence in core.scheduler.sequences:
        if sequence.blocks:
            waste.exact += sequence.prompt_length + sequence.request.sampling.max_tokens
            waste.whole += CONTEXT_LENGTH
            waste.filled += sequence.computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    requests = build_requests(options.requests)
    print(describe_machine())
    print(f"{len(requests)} requests, mean lengths {mean_lengths(requests)}, block size {BLOCK_SIZE}")
    print("in flight   paged waste   reserving prompt+max_tokens   reserving the context   scheduling per step / row")
    for concurrency in (1, 8, 32, 128, 256):
        waste = measure(concurrency, requests)
        per_step = waste.scheduling_s / waste.steps * 1e6
        per_row = waste.scheduling_s / waste.rows * 1e6
        print(
            f"{concurrency:9d}   {waste.paged_unfilled / waste.paged:11.2%}   {1 - waste.filled / waste.exact:27.2%}"
            f"   {1 - waste.filled / waste.whole:21.2%}   {per_step:13.1f} / {per_row:.2f} µs"
        )


def mean_lengths(requests: list[GenerationRequest]) -> str:
    prompt = sum(len(request.prompt) for request in requests) / len(requests)
    output = sum(request.sampling.max_tokens for request in requests) / len(requests)
    return f"{prompt:.0f} in, {output:.0f} out"


if __name__ == "__main__":
    main()
