from __future__ import annotations

import pytest
import torch

from tests.support.fresh import fresh_generator


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(params=["tiles", "pairs"])
def multiplied_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which the compiled kernels multiply; a CPU that has tiles has pairs, too."""
    way: str = request.param
    lanes = pytest.importorskip("kernels.lanes", reason="no numba")
    if not (lanes.has_tiles() if way == "tiles" else lanes.has_pairs()):
        pytest.skip(f"this CPU has no {way} of bfloat16")
    if way == "pairs":
        for kernel in ("tile_linear", "tile_attention"):
            monkeypatch.setattr(f"kernels.{kernel}.has_tiles", lambda: False)
    return way
