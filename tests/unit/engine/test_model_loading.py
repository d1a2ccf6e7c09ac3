"""From parameters to a model: nothing is held twice on the way."""

from __future__ import annotations

import weakref

import pytest
import torch

from engine.model_loading import HandedOver


def test_a_parameter_that_was_handed_over_is_held_by_who_took_it_alone() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(3)}
    held = weakref.ref(tensors["a"])
    parameters = HandedOver(tensors)
    assert "a" in parameters
    taken = parameters["a"]
    assert held() is taken
    del taken
    assert held() is None
    assert "a" not in parameters
    assert list(parameters) == ["b"]
    assert len(parameters) == 1
    with pytest.raises(KeyError):
        parameters["a"]
