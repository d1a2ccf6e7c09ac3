"""A compiled kernel's work, shared among the threads that the library computes with.

Numeric contract: none is touched. A kernel's items are independent of each other, and each is computed by one thread
from beginning to end; which, nobody may see. Whoever comes first takes the next item, so that long ones and short ones
need not be divided fairly beforehand.

Torch's products run in a team of OpenMP's threads, which wait a while for more after each. A second team beside it
would wait for the same cores; so kernels join the one that is there, by the entry that compilers use. Where torch has
brought no such library, the calling thread does all of it. No thread needs the interpreter's lock.

    arguments   int64: items taken, threads come, then what the kernel was given

Source: libgomp, `GOMP_parallel`; OpenMP 4.5.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

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


def run(kernel: int, threads: int, *arguments: int) -> None:
    """Return once `kernel`, the address of a compiled function of one int64, has run in so many threads."""
    given = array("q", (0, 0, *arguments))
    address, _ = given.buffer_info()
    start = _start()
    if threads > 1 and start is not None:
        start(kernel, address, threads, 0)
    else:
        _called(kernel)(address)


@cache
def _called(kernel: int) -> Any:
    return _Kernel(kernel)
