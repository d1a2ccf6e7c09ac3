"""Log-probabilities: of the distribution as the model gives it, before bias, penalties and temperature, and before
anything is excluded.

Float32, one row at a time: log-softmax by subtracting the maximum, in the library's kernel, whose bits depend on the
row alone (verified by tests/integration/test_invariance.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.request import TokenLogprob


def token_logprob(logprobs: npt.NDArray[np.float32], token: int, alternatives: int) -> TokenLogprob:
    """Return the entry of `token` in a row [V] of log-probabilities, with the likeliest others, ties by lowest id."""
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        order = torch.sort(torch.from_numpy(logprobs), descending=True, stable=True).indices[:alternatives].tolist()
        top = tuple((index, float(logprobs[index])) for index in order)
    return TokenLogprob(token, float(logprobs[token]), top)


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-probabilities of rows [R, V] float32, each row by itself."""
    return torch.log_softmax(logits, dim=-1)
