from __future__ import annotations

import pytest
import torch

from tests.support.fresh import fresh_generator


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(params=["tiles", "pairs"])
def by_tiles(request: pytest.FixtureRequest) -> bool:
    """Both ways in which the compiled kernels multiply; a CPU that has tiles has pairs, too."""
    tiles: bool = request.param == "tiles"
    lanes = pytest.importorskip("kernels.lanes", reason="no numba")
    if not (lanes.has_tiles() if tiles else lanes.has_pairs()):
        pytest.skip(f"this CPU has no {request.param} of bfloat16")
    return tiles
