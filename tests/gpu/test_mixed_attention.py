"""Attention of a step that mixes decodes and prompts: the same bits in either launch, and what leans is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.config import UnsupportedModel
from engine.device import DeviceUnavailable, choose_attention, named_refusals
from engine.model_runner import InvarianceUnavailable
from kernels.jit import INTERPRETED
from kernels.launch import launch_for
from kernels.mixed_attention import Mixed, mixed_attention, verify_invariance
from tests.support.device_engine import SMALL, TINY, config_of
from tests.support.paged_world import PagedWorld


@pytest.mark.parametrize("apart", [False] if INTERPRETED else [True, False])  # start-up, elsewhere, tries the other
def test_a_token_has_the_same_bits_whichever_launch_it_is_in(apart: bool, device: torch.device) -> None:
    heads, groups, size = (2, 1, 16) if INTERPRETED else (32, 8, 128)
    assert verify_invariance(apart, heads, groups, size, torch.bfloat16, device)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
def test_a_step_of_decodes_and_prompts_equals_the_reference_among_poison(
    dtype: torch.dtype, tolerance: float, device: torch.device, generator: torch.Generator
) -> None:
    world = PagedWorld([1, 65, 257, 70], (6, 2, 80), dtype, device, generator)
    decodes, prefills = [(0, 0, 1), (2, 256, 257)], [(1, 3, 17), (3, 0, 70), (2, 250, 251)]
    found = world.mixed(decodes, prefills)
    torch.testing.assert_close(found, world.reference([*decodes, *prefills]), atol=tolerance, rtol=tolerance)


def test_where_the_two_launches_differ_all_goes_by_one_and_where_none_holds_nothing_starts(
    device: torch.device,
) -> None:
    def differing(query: Tensor, keys: Tensor, values: Tensor, step: Mixed, scale: float) -> Tensor:
        result = mixed_attention(query, keys, values, step, scale)
        return result if step.decodes is None else result + 1

    def leaning(query: Tensor, keys: Tensor, values: Tensor, step: Mixed, scale: float) -> Tensor:
        return mixed_attention(query, keys, values, step, scale) + len(query)

    config = config_of("mistral", TINY if INTERPRETED else SMALL)
    assert choose_attention(config, device, attention=differing) == "prefill"
    with pytest.raises(InvarianceUnavailable, match=f"`{device}`"):
        choose_attention(config, device, attention=leaning)


def test_what_a_device_cannot_hold_or_was_not_written_for_is_refused_by_name() -> None:
    gpu = torch.device("cuda", 1)
    with pytest.raises(DeviceUnavailable, match="`cuda:1` has not enough memory"), named_refusals(gpu):
        raise torch.OutOfMemoryError
    with pytest.raises(UnsupportedModel, match=r"`decode_attention`.*512.*CPU only"), named_refusals(gpu):
        launch_for("decode_attention", 512, "sm_90")
