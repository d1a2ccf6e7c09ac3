"""Numbers at random, others every time; the seed stands in the output of a test that failed."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from tests.support.poison import among_nan


def fresh_generator() -> torch.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """Return bfloat16 of a standard normal distribution, between NaN."""
    return among_nan(torch.randn(*shape, generator=generator).bfloat16())
