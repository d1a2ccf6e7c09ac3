"""Kernels compiled by numba: taken where they serve a model, named in the policy, and done without elsewhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.model_loading import load_model
from engine.model_runner import LinearByShape, ModelRunner
from engine.models.compiled import compiled_arithmetic, compiled_policy
from engine.models.cpu_arithmetic import CpuArithmetic, Plans
from engine.numeric_policy import digest, numeric_policy
from engine.plan import Draw, RowPlan, StepPlan
from engine.reading import Reading
from engine.request import SamplingParams
from kernels.attention_plan import AttentionPlan
from tests.support.device_engine import SMALL, config_of

ROOT = Path(__file__).parents[3]
CONFIG = config_of("qwen3", SMALL)

try:
    from kernels.lane_silu_mul import lane_silu_mul
    from kernels.lanes import has_pairs
except ImportError:
    served = False
else:
    served = has_pairs()
where_served = pytest.mark.skipif(not served, reason="no numba, or this CPU has no bfloat16")


@where_served
def test_a_model_whose_sizes_fit_is_computed_by_them() -> None:
    found = compiled_arithmetic(CONFIG, ["tiles"])
    assert found is not None
    assert issubclass(found, CpuArithmetic)


@pytest.mark.parametrize("change", [{"head_dim": 10}, {"head_dim": 272}, {"hidden_size": 72}, {"intermediate_size": 8}])
def test_a_model_of_another_size_is_computed_without(change: dict[str, int]) -> None:
    assert compiled_arithmetic(replace(CONFIG, **change), ["tiles"]) is None  # type: ignore[arg-type]


def test_without_numba_everything_is_as_it_was() -> None:
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import engine.model_loading\n"
        "from engine.models.compiled import compiled_arithmetic\n"
        "from tests.support.device_engine import SMALL, config_of\n"
        "print(compiled_arithmetic(config_of('llama', SMALL), []), 'kernels.lanes' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["None", "False"]


@where_served
def test_who_compiled_them_is_in_the_numeric_policy(tiny_models: dict[str, Path]) -> None:
    torch.set_num_threads(1)
    with_them, without = (load_model(Reading(tiny_models["llama"]), 64, compiled=one) for one in (True, False))
    assert with_them.policy["compiled"] == compiled_policy()
    assert without.policy["compiled"] is None
    policies = [numeric_policy({}, "fused", compiled=said) for said in (None, compiled_policy(), {"numba": "0"})]
    assert len({digest(policy) for policy in policies}) == 3


@where_served
def test_their_product_is_chosen_and_gates_at_once_unless_they_are_not_wanted(tiny_models: dict[str, Path]) -> None:
    torch.set_num_threads(1)
    with_them, without = (load_model(Reading(tiny_models["llama"]), 64, compiled=one) for one in (True, False))
    chosen, plain = with_them.policy["linear"], without.policy["linear"]
    assert isinstance(chosen, dict)
    assert isinstance(plain, dict)
    assert set(chosen.values()) == {"tiles"}
    assert "tiles" not in plain.values()


@where_served
def test_a_gate_at_once_has_the_bits_of_its_steps_and_other_products_have_none() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((9, 64), (128, 64)))
    tiles, library = (LinearByShape({(128, 64): name}) for name in ("tiles", "library"))
    laid_out = tiles.pack(weight)
    found = tiles.gated(x, laid_out)
    assert found is not None
    assert torch.equal(found, lane_silu_mul(tiles(x, laid_out, None)))
    assert library.gated(x, weight) is None


@where_served
def test_with_them_and_without_the_same_is_nearly_computed(tiny_models: dict[str, Path]) -> None:
    torch.set_num_threads(1)
    said = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=True)
    tokens = tuple(3 + 7 * index % 300 for index in range(100))
    plan = StepPlan((RowPlan(tokens, 0, tuple(range(7)), said, (Draw(99),)),))
    ours, plain = (
        ModelRunner(load_model(Reading(tiny_models["qwen3"]), 128, compiled=one).model, 8).run(plan).sampled[0][0]
        for one in (True, False)
    )
    assert ours.token == plain.token
    assert abs(ours.logprob - plain.logprob) < 0.1


def test_plans_are_made_when_they_are_wanted_and_once() -> None:
    made: list[int | None] = []

    def plan(window: int | None) -> AttentionPlan:
        made.append(window)
        return AttentionPlan(2, 1, 1, ())

    plans = Plans((8, 16), plan)
    assert (list(plans), len(plans), made) == ([None, 8, 16], 3, [])
    assert 8 in plans
    assert 9 not in plans
    assert plans[16] is plans[16]
    assert made == [16]
    with pytest.raises(KeyError):
        plans[9]
