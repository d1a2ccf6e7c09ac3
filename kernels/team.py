"""A compiled kernel's work, shared among the threads that the library computes with.

Numeric contract: none is touched. A kernel's items are independent of each other, and each is computed by one thread
from beginning to end; which, nobody may see. Whoever comes first takes the next item, so that long ones and short ones
need not be divided fairly beforehand.

Torch's products run in a team of OpenMP's threads, which wait a while for more after each. A second team beside it
would wait for the same cores; so kernels join the one that is there, by the entry that compilers use. Where torch has
brought no such library, the calling thread does all of it. No thread needs the interpreter's lock.

    arguments   int64: items taken, threads come, then what the kernel was given

Within `recorded`, kernels are not run but written down, to be run one behind the other, as often as wanted: as with a
GPU's graphs, a step of few tokens, which is many short kernels, does not wait for Python between any two of them.

Source: libgomp, `GOMP_parallel`; OpenMP 4.5.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAKEN, COME, GIVEN = 0, 8, 16  # bytes into the arguments

_Start = Callable[[int, int, int, int], None]  # a kernel, its arguments, how many threads, flags
_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@cache
def _start() -> _Start | None:
    """Return what runs a kernel in every thread of the library's team, or None where there is no such team."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        start: Any = ctypes.CDLL(str(path)).GOMP_parallel
        start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        start.restype = None
        found: _Start = start
        return found
    return None


def shares(items: int, least: int) -> int:
    """Return how many of many equal items make a share of at least `least`, four shares a thread."""
    return max(least, -(-items // (4 * threads_for(items))))


def threads_for(items: int) -> int:
    """Return how many threads would share that many items."""
    return 1 if _start() is None else max(1, min(torch.get_num_threads(), items))


# A kernel, threads, arguments, and what they are addresses of.
_Launch = tuple[int, int, "array[int]", tuple[object, ...]]


class Recording:
    """Kernels in the order they were asked for, and the tensors that they read and write."""

    def __init__(self) -> None:
        self._launches: list[_Launch] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def add(self, launch: _Launch) -> None:
        self._launches.append(launch)

    def scratch(self, size: int) -> Tensor:
        """Return what any number of kernels may have, one after the other."""
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch

    def run(self, between: Callable[[], None], every: int) -> None:
        """Run all, and call `between` before each `every` kernels; what it raises ends the run."""
        for number, launch in enumerate(self._launches):
            if number % every == 0:
                between()
            _run(launch)


_recording: ContextVar[Recording | None] = ContextVar("_recording", default=None)


def run(kernel: int, threads: int, *given: Tensor | int | None) -> None:
    """Run `kernel`, the address of a compiled function of one int64, in so many threads; return when it has run.

    It is given addresses, of a tensor that of its first number, of None zero.
    """
    numbers = [one.data_ptr() if isinstance(one, Tensor) else one or 0 for one in given]
    launch, recording = (kernel, threads, array("q", (0, 0, *numbers)), given), _recording.get()
    if recording is None:
        _run(launch)
    else:
        recording.add(launch)


def scratch(size: int) -> Tensor:
    """Return so many bytes, uint8, for one kernel that is run now, or for those of a recording."""
    recording = _recording.get()
    return torch.empty(size, dtype=torch.uint8) if recording is None else recording.scratch(size)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Write down what this thread runs within. Nothing but kernels may read there what kernels write."""
    recording = Recording()
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def _run(launch: _Launch) -> None:
    kernel, threads, arguments, _ = launch
    arguments[0] = arguments[1] = 0
    address, _ = arguments.buffer_info()
    start = _start()
    if threads > 1 and start is not None:
        start(kernel, address, threads, 0)
    else:
        _called(kernel)(address)


@cache
def _called(kernel: int) -> Any:
    return _Kernel(kernel)
