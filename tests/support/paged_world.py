"""Sequences in shuffled blocks of a cache, NaN where nothing was written, and questions about their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_state import FULL, AttentionVariant, attention_reference
from kernels.decode_attention import decode_attention_triton
from kernels.mixed_attention import Decodes, Mixed, Prefills, mixed_attention
from kernels.prefill_attention import prefill_attention_triton
from tests.support.poison import among_nan

PAGE = 16
Piece = tuple[int, int, int]  # a sequence, and the positions from … to


class PagedWorld:
    def __init__(
        self,
        lengths: list[int],
        layout: tuple[int, int, int],  # heads, groups, size of a head
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        variant: AttentionVariant = FULL,
    ) -> None:
        heads, groups, size = layout
        self.device, self.variant, self.scale = device, variant, size**-0.5
        blocks = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
        self.table = torch.full((len(lengths), max(blocks) + 3), order[-1], dtype=torch.int32)  # a block nobody wrote
        shape = (len(order), PAGE, groups, size)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype) for _ in "kv")
        self.query: list[Tensor] = []
        for index, length in enumerate(lengths):
            self.table[index, : blocks[index]] = torch.tensor(order[: blocks[index]])
            del order[: blocks[index]]
            at = torch.arange(length)
            for cache in (self.keys, self.values):
                drawn = torch.randn(length, groups, size, generator=generator).to(dtype)
                cache[self.table[index, at // PAGE].long(), at % PAGE] = drawn
            self.query.append(torch.randn(length, heads, size, generator=generator).mul(2).to(device, dtype))
        self.table = self.table.to(device)
        self.keys, self.values = (among_nan(cache.to(device)) for cache in (self.keys, self.values))

    def decode(self, rows: list[tuple[int, int]], arrived: Tensor | None = None) -> Tensor:
        """Return the attention of single tokens: a sequence, and the position of its newest one.

        In one launch where counters are given, else in two.
        """
        table = self.table[[index for index, _ in rows]]
        lengths = self._counts(position + 1 for _, position in rows)
        query = among_nan(torch.stack([self.query[index][position] for index, position in rows]))
        return decode_attention_triton(query, self.keys, self.values, table, lengths, self.scale, self.variant, arrived)

    def prefill(self, pieces: list[Piece]) -> Tensor:
        return prefill_attention_triton(*self._asked(pieces), self.scale, self.variant)

    def mixed(self, decodes: list[Piece], prefills: list[Piece]) -> Tensor:
        """Return the attention of pieces of one token, and of pieces of several, of one step; without a variant."""
        (first, keys, values, *tokens), (rest, _, _, table, starts, lengths) = map(self._asked, (decodes, prefills))
        step = Mixed(Decodes(tokens[0], tokens[2]), Prefills(table, lengths, starts))
        return mixed_attention(among_nan(torch.cat((first, rest))), keys, values, step, self.scale)

    def reference(self, pieces: list[Piece]) -> Tensor:
        return attention_reference(*self._asked(pieces), self.scale, self.variant)

    def _asked(self, pieces: list[Piece]) -> tuple[Tensor, ...]:
        query = among_nan(torch.cat([self.query[index][start:end] for index, start, end in pieces]))
        starts = torch.tensor([0, *(end - start for _, start, end in pieces)]).cumsum(0).to(self.device, torch.int32)
        lengths = self._counts(end for _, _, end in pieces)
        return query, self.keys, self.values, self.table[[index for index, _, _ in pieces]], starts, lengths

    def _counts(self, counts: object) -> Tensor:
        return torch.tensor([*counts], dtype=torch.int32, device=self.device)  # type: ignore[misc]
