from __future__ import annotations

import pytest
import torch

from tests.support.fresh import fresh_generator


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()
