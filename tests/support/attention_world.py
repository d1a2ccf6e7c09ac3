"""Sequences in a paged cache full of NaN, and their attention: by segments, and by the slow reference."""

from __future__ import annotations

from typing import Any

import torch

from kernels.attention_plan import plan_attention
from kernels.paged_attention import Segment, paged_attention, paged_attention_reference

PAGE = 16


class World:
    """Sequences in shuffled blocks of a poisoned cache: what was not written, the zero block aside, is NaN."""

    def __init__(self, lengths: list[int], heads: int, groups: int, size: int) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + heads)
        self.heads, self.groups = heads, groups
        blocks = [-(-length // PAGE) for length in lengths]
        total = sum(blocks) + 3
        order = torch.randperm(total, generator=generator).tolist()
        width = max(blocks) + 2
        self.table = torch.full((len(lengths), width), order[-1])  # beyond a context: a block nobody wrote
        self.caches = [torch.full((total + 1, PAGE, groups, size), torch.nan).bfloat16() for _ in "kv"]
        self.query: list[torch.Tensor] = []
        for index, length in enumerate(lengths):
            self.table[index, : blocks[index]] = torch.tensor(order[: blocks[index]])
            del order[: blocks[index]]
            at = torch.arange(length)
            for cache in self.caches:
                drawn = torch.randn(length, groups, size, generator=generator).bfloat16()
                cache[self.table[index, at // PAGE], at % PAGE] = drawn
            self.query.append(torch.randn(length, heads, size, generator=generator).mul(2).bfloat16())
        for cache in self.caches:
            cache[-1] = 0
        self.zero_slot = total * PAGE

    def attend(
        self,
        rows: list[tuple[int, int, int]],
        segment: Segment,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each row: a sequence, and the positions from … to of which attention is asked."""
        query, sequence, positions = self.asked(rows)
        plan = plan_attention(self.table, sequence, positions, self.heads, self.groups, PAGE, self.zero_slot, window)
        return paged_attention(query, *self.caches, plan, query.shape[-1] ** -0.5, segment, sinks)

    def asked(self, rows: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the query of such rows, and each token's sequence and position."""
        sequence = torch.cat([torch.full((end - start,), index) for index, start, end in rows])
        positions = torch.cat([torch.arange(start, end) for _, start, end in rows])
        return torch.cat([self.query[index][start:end] for index, start, end in rows]), sequence, positions

    def reference(self, index: int, **features: Any) -> torch.Tensor:
        query = self.query[index]
        sequence, positions = torch.full((len(query),), index), torch.arange(len(query))
        scale = query.shape[-1] ** -0.5
        return paged_attention_reference(query, *self.caches, self.table, sequence, positions, scale, **features)
