"""Pooling: hidden states of a text → one vector of length 1.

In float64, token after token: sums do not depend on how the text was cut into steps.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.plan import Pool
from engine.request import Pooling


def pool(wanted: Pool, hidden: npt.NDArray[np.float32]) -> bytes:
    """Return the hidden state of the last token, or the sums so far, from those of a row, [T, H]."""
    states = hidden.astype(np.float64)
    if wanted.pooling is Pooling.LAST:
        return bytes(states[-1].data)
    if wanted.before is not None:
        states[0] += np.frombuffer(wanted.before)
    return bytes(np.add.accumulate(states, axis=0)[-1].data)  # one after the other, unlike `sum`


def embedding(pooled: bytes) -> bytes:
    """Return the vector [H] float32, little-endian, of length 1, in the direction of what was pooled.

    A mean has the direction of its sums.
    """
    vector = np.frombuffer(pooled)
    length = math.sqrt(math.fsum(vector * vector))
    unit = vector / length if length > 0 else vector
    return unit.astype("<f4").tobytes()
