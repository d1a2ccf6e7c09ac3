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


@pytest.mark.parametrize("apart", [False] if INTERPRETED else [True, False])  # start-up, elsewhere, tries the other
def test_a_token_has_the_same_bits_whichever_launch_it_is_in(apart: bool, device: torch.device) -> None:
    heads, groups, size = (2, 1, 16) if INTERPRETED else (32, 8, 128)
    assert verify_invariance(apart, heads, groups, size, torch.bfloat16, device)


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
