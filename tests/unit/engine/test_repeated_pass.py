"""A pass that is launched again computes what its layers compute, bit for bit, whatever else was computed between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from engine.model_loading import load_model
from engine.model_runner import ModelRunner
from engine.models import repeated_pass
from engine.models.arithmetic import KVCache, Rotation
from engine.models.cpu_arithmetic import StepInputs
from engine.models.decoder import Decoder
from engine.plan import Draw, RowPlan, StepInterrupted
from engine.reading import Reading
from engine.request import SamplingParams

pytest.importorskip("numba")

from engine.models.compiled_arithmetic import CompiledThroughout
from kernels.lanes import has_pairs

pytestmark = pytest.mark.skipif(not has_pairs(), reason="this CPU has no bfloat16")

SAID = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
BLOCKS = 64


class Layered(CompiledThroughout):
    """Repeats nothing."""

    def through(
        self,
        layers: repeated_pass.Layers,
        inputs: StepInputs,
        rotation: Rotation,
        embedded: torch.Tensor,
        caches: Sequence[KVCache],
    ) -> torch.Tensor:
        return layers(inputs, rotation, embedded, caches)


@pytest.fixture(params=["llama", "qwen3", "qwen2"])
def decoder(tiny_models: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Decoder[StepInputs]]:
    torch.set_num_threads(1)
    found = load_model(Reading(tiny_models[request.param]), 64).model
    assert isinstance(found, Decoder)
    assert type(found._arithmetic) is CompiledThroughout
    yield found
    torch.set_num_threads(1)


def row(number: int, start: int, count: int) -> RowPlan:
    tokens = tuple((7 * number + 13 * start + 5 * at) % 300 for at in range(count))
    return RowPlan(tokens, start, tuple(range(8 * number, 8 * number + 8)), SAID, (Draw(count - 1),))


def steps() -> Iterator[list[RowPlan]]:
    """Prompts, then decoding by as many as there are, fewer, and all again; now and then several tokens a row."""
    yield [row(number, 0, 20 + number) for number in range(8)]
    for at in range(6):
        yield [row(number, 20 + number + at, 1) for number in range(8)]
    yield [row(number, 26 + number, 1) for number in range(0, 8, 3)]
    yield [row(0, 27, 5), row(1, 28, 1), row(5, 31, 2)]
    yield [row(number, 40 + number, 1) for number in range(8)]
    yield [row(number, 41 + number, 4) for number in range(8)]  # 32
    yield [row(7, 60, 33)]
    yield [row(7, 93, 1)]


def test_every_step_is_computed_as_its_layers_compute_it(decoder: Decoder[StepInputs]) -> None:
    def all_of(kind: type[CompiledThroughout]) -> list[torch.Tensor]:
        decoder._arithmetic.__class__ = kind
        runner = ModelRunner(decoder, BLOCKS)
        with torch.inference_mode():
            hidden = [decoder.hidden(runner.inputs(rows), runner.caches) for rows in steps()]
        return hidden + [one for cache in runner.caches for one in (cache.key, cache.value)]

    repeated, layered = all_of(CompiledThroughout), all_of(Layered)
    assert all(torch.equal(*pair) for pair in zip(repeated, layered, strict=True))


def test_two_caches_and_two_counts_of_threads_do_not_take_each_others_pass(decoder: Decoder[StepInputs]) -> None:
    first, second = ModelRunner(decoder, BLOCKS), ModelRunner(decoder, BLOCKS)
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with torch.inference_mode():
        for number, rows in enumerate(steps()):
            for which, runner in enumerate((first, second)):
                torch.set_num_threads(1 + (number + which) % 2)
                found[which].append(decoder.hidden(runner.inputs(rows), runner.caches))
    assert all(torch.equal(*pair) for pair in zip(found[0], found[1], strict=True))


def test_a_pass_that_gives_way_leaves_nothing_behind(decoder: Decoder[StepInputs]) -> None:
    rows = [row(number, 20, 1) for number in range(5)]
    runner = ModelRunner(decoder, BLOCKS)
    with torch.inference_mode():
        whole = decoder.hidden(runner.inputs(rows), runner.caches)
        polls: list[int] = []
        while not polls or polls[-1]:  # at the first poll, the second … until there are none left
            left = len(polls) + 1

            def interrupted() -> bool:
                nonlocal left
                left -= 1
                return left == 0

            try:
                decoder.hidden(runner.inputs([row(number, 21, 1) for number in range(5)], interrupted), runner.caches)
                polls.append(0)
            except StepInterrupted:
                polls.append(1)
            assert torch.equal(decoder.hidden(runner.inputs(rows), runner.caches), whole)
    assert sum(polls) >= 1


def test_no_more_passes_are_kept_than_were_wanted_last(decoder: Decoder[StepInputs]) -> None:
    runner = ModelRunner(decoder, BLOCKS)
    arithmetic = decoder._arithmetic
    assert isinstance(arithmetic, CompiledThroughout)
    with torch.inference_mode():
        for count in (*range(1, 9), 1, *range(9, 12), 33):
            decoder.hidden(runner.inputs([row(0, 0, count)]), runner.caches)
    kept = [shape.tokens for shape in arithmetic._passes._kept]
    assert kept == [5, 6, 7, 8, 1, 9, 10, 11]
    assert len(kept) == repeated_pass.MOST_PASSES
