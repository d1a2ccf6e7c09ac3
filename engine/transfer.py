"""Between host and device: what a step needs goes there in one copy, what it gives comes back in one.

Each array begins at a multiple of 16 bytes, which Triton looks at when it compiles: were it otherwise, where an array
happens to lie would choose the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes

_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float64": torch.float64}


class Outbox:
    """Arrays that go to a device together."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []

    def add(self, array: npt.NDArray[Any]) -> int:
        """Take an array of int32, int64 or float64; return the number under which it arrives."""
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> list[Tensor]:
        """Return all arrays as tensors on the device, by their numbers. Nothing waits for the copy but the device."""
        starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in self._arrays)]).tolist()
        staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        room = staged.numpy()
        for array, start in zip(self._arrays, starts[:-1], strict=True):
            room[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        there = staged.to(device, non_blocking=True)
        return [
            there[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
            for array, start in zip(self._arrays, starts[:-1], strict=True)
        ]


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of a device on the host, once what they wait for is computed."""
    if not tensors:
        return []
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    starts = np.cumsum([0, *(-(-len(part) // ALIGNMENT) * ALIGNMENT for part in flat)]).tolist()
    here = torch.cat([F.pad(part, (0, -len(part) % ALIGNMENT)) for part in flat]).cpu()
    return [
        here[start : start + len(part)].view(tensor.dtype).view(tensor.shape)
        for tensor, part, start in zip(tensors, flat, starts[:-1], strict=True)
    ]


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that begins where every array of a step does."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
