"""Where the kernels run: on a GPU where there is one, in Triton's interpreter where TRITON_INTERPRET=1 asks for it.

The same tests serve both. The interpreter proves indexing and order, a GPU the arithmetic as well; where there is
neither, every test is skipped by name. tests/unit/kernels/test_interpreted.py walks through all of them anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.jit import INTERPRETED
from kernels.linear import forbid_split_k
from tests.support.fresh import fresh_generator


@pytest.fixture(scope="session", autouse=True)
def _poison_what_nobody_wrote() -> Iterator[None]:
    """Fill every tensor that torch allocates with NaN: an output or a state that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _leave_out_what_the_interpreter_throws_away() -> None:
    """Before every sum and product of integers it works out whether it overflows, and looks at that only where kernels
    are debugged, which here cannot be asked for: a fifth of its time."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

        assert not interpreter_builder.options.debug
        interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here, and TRITON_INTERPRET=1 was not set")
    forbid_split_k()  # before CUDA starts, as the engine does
    return torch.device("cuda")


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()
