"""How each kernel is launched: one table, by operation, size and device.

A row's blocks and warps fix the order of its sums, so a change here changes bits: this file is part of what the numeric
policy digests. No kernel is compiled with contraction: which product is fused into which sum would be the compiler's
choice, kernel by kernel, and prefill must equal decode. Where a fused sum is wanted it is written.

Nothing here was tuned on a device. What is known comes from compiling: nothing spills on sm_90. A norm's row of 65,536
elements did, which is why the table ends at half of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

ANY = "any"


@dataclass(frozen=True, slots=True)
class Launch:
    warps: int  # of 32 threads, a power of two
    stages: int  # of the loop's loads in flight, 1 … 5
    block_m: int = 1  # rows of a program
    block_n: int = 1  # columns of a step
    block_k: int = 1  # depth of a step

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Entry:
    operation: str
    device: str  # `sm_90`, or any
    at_most: int  # the size up to which this entry stands; what the size is, the operation says
    launch: Launch


TABLE = (
    Entry("rms_norm", ANY, 1024, Launch(warps=4, stages=1)),  # size: elements of a row
    Entry("rms_norm", ANY, 4096, Launch(warps=8, stages=1)),
    Entry("rms_norm", ANY, 32768, Launch(warps=16, stages=1)),
    Entry("silu_mul", ANY, 1 << 30, Launch(warps=4, stages=1, block_n=1024)),  # elements of a row's half
    Entry("rope_store", ANY, 256, Launch(warps=4, stages=1, block_m=8)),  # elements of a head
    # The load of a block's id, before that of its keys, takes half the stages: 5 would give a second buffer of keys.
    Entry("decode_attention", ANY, 128, Launch(warps=4, stages=3, block_m=16)),  # elements of a head
    Entry("decode_attention", ANY, 256, Launch(warps=4, stages=2, block_m=16)),
    Entry("merge_attention", ANY, 256, Launch(warps=4, stages=1)),  # elements of a head
    Entry("prefill_attention", ANY, 256, Launch(warps=8, stages=3, block_m=128, block_n=128)),  # elements of a head
    # Of a cache of float8, which takes registers to widen: of a head of 256 a quarter of the values' columns, not half.
    Entry("decode_attention_float8", ANY, 128, Launch(warps=4, stages=3, block_m=16)),
    Entry("decode_attention_float8", ANY, 256, Launch(warps=4, stages=2, block_m=16)),
    Entry("prefill_attention_float8", ANY, 128, Launch(warps=8, stages=3, block_m=128, block_n=128)),
    Entry("prefill_attention_float8", ANY, 256, Launch(warps=8, stages=3, block_m=128, block_n=64)),
    # `block_k` of all entries for "gemm" is the same: it is the step in which K is walked.
    Entry("gemm", ANY, 16, Launch(warps=4, stages=5, block_m=16, block_n=32, block_k=128)),  # rows
    Entry("gemm", ANY, 32, Launch(warps=4, stages=4, block_m=32, block_n=64, block_k=128)),
    Entry("gemm", ANY, 64, Launch(warps=4, stages=4, block_m=64, block_n=64, block_k=128)),
    Entry("gemm", ANY, 1 << 30, Launch(warps=8, stages=3, block_m=128, block_n=128, block_k=128)),
    # As few columns as there may be: no number of rows makes them fewer.
    Entry("gemm_one_tile", ANY, 1 << 30, Launch(warps=4, stages=4, block_m=64, block_n=16, block_k=128)),  # rows
    Entry("route", ANY, 1024, Launch(warps=1, stages=1)),  # experts
    Entry("grouped", ANY, 1024, Launch(warps=4, stages=1, block_n=1024)),  # groups
    Entry("experts", ANY, 1 << 30, Launch(warps=4, stages=1, block_n=1024)),  # elements of a row
    Entry("prepare", ANY, 1 << 30, Launch(warps=4, stages=1, block_m=128)),  # tokens of a step
    Entry("sample", ANY, 1 << 30, Launch(warps=16, stages=1, block_n=1024)),  # the vocabulary
    Entry("logprobs", ANY, 1 << 30, Launch(warps=8, stages=1, block_n=4096)),  # the vocabulary
)


class NoLaunch(LookupError):
    """The table has no entry for an operation at this size."""


@lru_cache(maxsize=4096)  # looked up for every launch of a step
def launch_for(operation: str, size: int, device: str) -> Launch:
    """Return the first entry that fits: those of the device itself go before those of any.

    Raises:
        NoLaunch: there is none.
    """
    for named in (device, ANY):
        for entry in TABLE:
            if entry.operation == operation and entry.device == named and size <= entry.at_most:
                return entry.launch
    raise NoLaunch(f"`{operation}` has no entry in the launch table for a size of {size}")


def device_of(tensor: Tensor) -> str:
    """Return the name under which the table knows the device of a tensor, such as `sm_90`."""
    if not tensor.is_cuda:
        return ANY
    return _architecture(tensor.device)


@cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def power_of_two(size: int, least: int = 16) -> int:
    """Return the width of a block that holds `size`: Triton's are powers of two."""
    return max(least, 1 << (size - 1).bit_length())
