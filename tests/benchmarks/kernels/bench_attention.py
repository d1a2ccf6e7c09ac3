"""Decode and prefill attention over a paged cache, at the heads of Qwen3 8B, beside torch's over contiguous keys.

    python -m tests.benchmarks.kernels.bench_attention

Decode is held against the copy: the keys and values of every context, read once. Prefill is held against the matrix
product: the operations of what a causal row sees. torch's attention is given keys that lie one after another, without a
block table, and so does a little less. A cache of float8 is held against the bytes that it has, half as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_state import FULL
from kernels.decode_attention import decode_attention_triton
from kernels.float8 import to_float8
from kernels.prefill_attention import prefill_attention_triton
from tests.benchmarks.kernels.ceilings import Ceilings, measure, seconds_of

DEVICE = "cuda"
HEADS, GROUPS, SIZE, PAGE = 32, 8, 128, 16
SCALE = SIZE**-0.5
DECODES = ((1, 1024), (1, 32768), (16, 8192), (64, 4096), (256, 1536))  # sequences, tokens of each context
PREFILLS = ((1, 2048, 2048), (8, 1024, 1024), (1, 8192, 8192), (1, 2048, 32768))  # sequences, new tokens, context


@dataclass(frozen=True, slots=True)
class Cache:
    keys: Tensor  # [N, PAGE, GROUPS, SIZE]
    values: Tensor
    table: Tensor  # [sequences, context / PAGE], in any order
    lengths: Tensor  # [sequences]

    @property
    def bytes_read(self) -> int:
        """Of keys and values, each once; every context is as long as the first."""
        return 2 * self.keys.element_size() * self.table.numel() * PAGE * GROUPS * SIZE

    @property
    def narrowed(self) -> Cache:
        return Cache(to_float8(self.keys), to_float8(self.values), self.table, self.lengths)

    def in_order(self, cache: Tensor) -> Tensor:
        """Return [sequences, GROUPS, context, SIZE], as torch takes it."""
        rows = cache[self.table.long()].flatten(1, 2)
        return rows.transpose(1, 2).contiguous()


def draw(sequences: int, context: int) -> Cache:
    blocks = sequences * context // PAGE
    keys, values = (torch.randn(blocks, PAGE, GROUPS, SIZE, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")
    table = torch.randperm(blocks, device=DEVICE).int().view(sequences, -1)
    return Cache(keys, values, table, torch.full((sequences,), context, dtype=torch.int32, device=DEVICE))


def decode(sequences: int, context: int, ceilings: Ceilings) -> None:
    cache = draw(sequences, context)
    query = torch.randn(sequences, HEADS, SIZE, device=DEVICE).bfloat16()
    keys, values = cache.in_order(cache.keys), cache.in_order(cache.values)
    narrow, queries = cache.narrowed, 2 * 2 * query.numel()
    counters = torch.zeros(sequences, GROUPS, dtype=torch.int32, device=DEVICE)

    def ours(cache: Cache, arrived: Tensor | None = None) -> Tensor:
        paged = (query, cache.keys, cache.values, cache.table, cache.lengths, SCALE, FULL)
        return decode_attention_triton(*paged, arrived)

    for name, call, read in (
        ("ours", lambda: ours(cache), cache.bytes_read),
        ("ours, in one launch", lambda: ours(cache, counters), cache.bytes_read),
        ("ours, float8", lambda: ours(narrow), narrow.bytes_read),
        (
            "torch",
            lambda: F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True),
            cache.bytes_read,
        ),
    ):
        print(ceilings.line(f"decode {sequences} × {context}: {name}", seconds_of(call), read + queries))


def prefill(sequences: int, tokens: int, context: int, ceilings: Ceilings) -> None:
    cache = draw(sequences, context)
    query = torch.randn(sequences * tokens, HEADS, SIZE, device=DEVICE).bfloat16()
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE) * tokens
    narrow = cache.narrowed

    def ours(cache: Cache) -> Tensor:
        paged = (query, cache.keys, cache.values, cache.table, starts, cache.lengths, SCALE, FULL)
        return prefill_attention_triton(*paged)

    seen = sequences * (tokens * (context - tokens) + tokens * (tokens + 1) // 2)  # pairs of a row and a key
    moved = cache.bytes_read + 2 * 2 * query.numel()
    name, operations = f"prefill {sequences} × {tokens} of {context}", 4 * seen * HEADS * SIZE
    print(ceilings.line(f"{name}: ours", seconds_of(lambda: ours(cache)), moved, operations))
    read = narrow.bytes_read + 2 * 2 * query.numel()
    print(ceilings.line(f"{name}: ours, float8", seconds_of(lambda: ours(narrow)), read, operations))
    if tokens < context:
        return  # torch's causal mask begins at the first key
    rows = query.view(sequences, tokens, HEADS, SIZE).transpose(1, 2).contiguous()
    keys, values = cache.in_order(cache.keys), cache.in_order(cache.values)
    taken = seconds_of(lambda: F.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=True))
    print(ceilings.line(f"{name}: torch", taken, moved, operations))


def main() -> None:
    ceilings = measure()
    for sequences, context in DECODES:
        decode(sequences, context, ceilings)
    for sequences, tokens, context in PREFILLS:
        prefill(sequences, tokens, context, ceilings)


if __name__ == "__main__":
    main()
