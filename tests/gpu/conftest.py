"""Where the kernels run: on a GPU where there is one, in Triton's interpreter where TRITON_INTERPRET=1 asks for it.

The same tests serve both. The interpreter proves indexing and order, a GPU the arithmetic as well; where there is
neither, every test is skipped by name. tests/unit/kernels/test_interpreted.py walks through all of them anywhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import torch

from kernels.jit import INTERPRETED
from kernels.linear import forbid_split_k


@pytest.fixture(scope="session", autouse=True)
def _poison_what_nobody_wrote() -> Iterator[None]:
    """Fill every tensor that torch allocates with NaN: an output or a state that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here, and TRITON_INTERPRET=1 was not set")
    forbid_split_k()  # before CUDA starts, as the engine does
    return torch.device("cuda")


@pytest.fixture(scope="session")
def most_rows() -> int:
    """Rows of the largest batch: the interpreter takes milliseconds for each."""
    return 20 if INTERPRETED else 2048


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh numbers every time; the seed stands in the output of a test that failed."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
