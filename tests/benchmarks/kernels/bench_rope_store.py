"""Norm of the heads, rotation and store of a step, at the heads of Qwen3 8B, beside the same in torch and compiled.

python -m tests.benchmarks.kernels.bench_rope_store
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.float8 import to_float8
from kernels.rope_store import HeadNorm, rope, rope_store_triton, store_kv
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

DEVICE = "cuda"
HEADS, GROUPS, SIZE = 32, 8, 128
TOKENS = (1, 256, 8192)
PAGE, BLOCKS, POSITIONS = 16, 4096, 4096  # tokens of a block, blocks of the cache, rows of the angles
EPSILON = 1e-6


def by_torch(
    qkv: Tensor,
    norm: HeadNorm,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    query, key, value = torch.split(qkv.view(len(qkv), -1, SIZE), [HEADS, GROUPS, GROUPS], dim=1)
    query, key = (F.rms_norm(x, (SIZE,), weight, EPSILON) for x, weight in ((query, norm.query), (key, norm.key)))
    cos, sin = cos[positions], sin[positions]
    store_kv(rope(key, cos, sin), value, keys, values, slots)
    return rope(query, cos, sin)


def compare(tokens: int, ceilings: Ceilings) -> None:
    qkv = torch.randn(tokens, (HEADS + 2 * GROUPS) * SIZE, device=DEVICE).bfloat16()
    norm = HeadNorm(*(torch.randn(SIZE, device=DEVICE).bfloat16() for _ in "qk"), EPSILON)
    cos, sin = (torch.randn(POSITIONS, SIZE // 2, device=DEVICE) for _ in "cs")
    positions = torch.randint(0, POSITIONS, (tokens,), device=DEVICE)
    slots = torch.randperm(PAGE * BLOCKS, device=DEVICE)[:tokens]
    keys, values = (torch.zeros(BLOCKS, PAGE, GROUPS, SIZE, device=DEVICE).bfloat16() for _ in "kv")
    compiled = torch.compile(by_torch)
    narrow = [to_float8(cache) for cache in (keys, values)]
    given = (qkv, norm, cos, sin, positions, slots)
    moved = 2 * 2 * qkv.numel() + 4 * tokens * SIZE + 16 * tokens
    for name, call, saved in (
        ("ours", lambda: rope_store_triton(*given, keys, values), 0),
        ("ours, float8", lambda: rope_store_triton(*given, *narrow), 2 * tokens * GROUPS * SIZE),
        ("torch", lambda: by_torch(*given, keys, values), 0),
        ("torch compiled", lambda: compiled(*given, keys, values), 0),
    ):
        print(ceilings.line(f"{tokens} tokens: {name}", seconds_of(call), moved - saved))


def main() -> None:
    ceilings = measure()
    for tokens in TOKENS:
        compare(tokens, ceilings)


if __name__ == "__main__":
    main()
