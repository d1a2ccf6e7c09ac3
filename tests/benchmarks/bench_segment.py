"""Attention on the CPU by the length of a segment: what 256, 512 and 1,024 keys cost, beside each other.

    python -m tests.benchmarks.bench_segment [--threads 1]

Short segments are merged more often; long ones compute what a row may not see, and are read for the last few keys too.
Each figure is the least CPU time of many calls, the three lengths in turns; the plan is made once, as for all layers of
a step. Asserts nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention_plan import SEGMENT, AttentionPlan, plan_attention
from kernels.paged_attention import SEGMENTS, Segment, paged_attention, verify_invariance
from tests.benchmarks.machine import describe_machine

LENGTHS = (256, 512, 1024)  # keys of a segment
CONTEXTS = (100, 300, 600, 1000, 2000, 4000)  # tokens of each sequence, the new ones included
SHAPES = ((8, 4, 32), (14, 2, 64))  # heads, groups, size: of the checkpoints of bench_peers
PAGE = 16
REPEATS = 40


@dataclass(frozen=True, slots=True)
class Step:
    """New tokens at the end of sequences of one length."""

    name: str
    sequences: int
    new: int  # tokens of each


STEPS = (Step("decode", 1, 1), Step("decode", 16, 1), Step("prefill", 1, 64), Step("prefill", 1, 512))


@dataclass(frozen=True, slots=True)
class World:
    query: Tensor
    key: Tensor
    value: Tensor
    plans: dict[int, AttentionPlan]  # by length of a segment

    def seconds(self, length: int, segment: Segment) -> float:
        begun = time.process_time()
        paged_attention(self.query, self.key, self.value, self.plans[length], self.query.shape[-1] ** -0.5, segment)
        return time.process_time() - begun


def make_world(step: Step, context: int, heads: int, groups: int, size: int) -> World:
    new, pages = min(step.new, context), -(-context // PAGE)
    blocks = step.sequences * pages
    table = torch.arange(blocks).view(step.sequences, pages)
    sequence_of = torch.arange(step.sequences).repeat_interleave(new)
    position_of = torch.arange(context - new, context).repeat(step.sequences)
    cache = [torch.randn(blocks + 1, PAGE, groups, size).bfloat16() for _ in "kv"]
    for one in cache:
        one[-1] = 0
    plans = {
        length: plan_attention(table, sequence_of, position_of, heads, groups, PAGE, blocks * PAGE, segment=length)
        for length in LENGTHS
    }
    return World(torch.randn(len(position_of), heads, size).bfloat16(), *cache, plans)


def least_seconds(world: World, segment: Segment) -> dict[int, float]:
    least = dict.fromkeys(LENGTHS, float("inf"))
    for _ in range(REPEATS):
        for length in LENGTHS:
            least[length] = min(least[length], world.seconds(length, segment))
    return least


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"{describe_machine()}; torch {torch.__version__}, {threads} threads")
    others = [length for length in LENGTHS if length != SEGMENT]
    for heads, groups, size in SHAPES:
        invariant = (name for name, one in SEGMENTS.items() if verify_invariance(one, groups, size, torch.bfloat16))
        name = next(invariant)
        print(f"{heads} heads in {groups} groups of {size}, `{name}`; times the CPU time of segments of {SEGMENT}")
        print(f"{'step':<16} {'context':>7} {f'{SEGMENT}, µs':>9} " + " ".join(f"{length:>6}" for length in others))
        for step in STEPS:
            for context in CONTEXTS:
                least = least_seconds(make_world(step, context, heads, groups, size), SEGMENTS[name])
                ratios = " ".join(f"{least[length] / least[SEGMENT]:>6.2f}" for length in others)
                named = f"{step.name} {step.sequences} x {step.new}"
                print(f"{named:<16} {context:>7} {1e6 * least[SEGMENT]:>9.0f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
