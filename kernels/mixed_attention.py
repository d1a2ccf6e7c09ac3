"""Attention of a step on a GPU: sequences that compute one token, and sequences that compute more, in two launches.

    query  [ a | b | c c c c | d d ]      a and b decode and stand first; c and d read their prompts
             └ decode ┘ └─ prefill ─┘

Numeric contract: attention_state.py. A token's bits are the same whichever launch it is in, which a device has to show:
`verify_invariance`. Where its instructions for few rows and for many do not agree, no sequence is told apart and all go
by prefill, one token or more: slower where many decode, and alike by construction. Knows no sequence but by its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention_state import FULL, SEGMENT, TILE
from kernels.decode_attention import decode_attention_triton
from kernels.prefill_attention import prefill_attention_triton

PAGE = 16  # tokens of a block, where a device is tried
PROBED = (0, 1, TILE - 1, TILE, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 70)  # positions


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences of one token each."""

    block_table: Tensor  # [S, M] int32  block ids; entries beyond the context are never read
    context: Tensor  # [S] int32  tokens stored, the new one included


@dataclass(frozen=True, slots=True)
class Prefills:
    """Sequences of any number of tokens, at least one."""

    block_table: Tensor  # [S, M] int32
    context: Tensor  # [S] int32  tokens stored, the new ones included
    starts: Tensor  # [S + 1] int32  ascending from 0: where each one's tokens begin among those of all


@dataclass(frozen=True, slots=True)
class Mixed:
    """The sequences of a step, in the order of its tokens; at least one."""

    decodes: Decodes | None
    prefills: Prefills | None


def mixed_attention(
    query: Tensor,  # [T, H, D]  of the decodes, then of the prefills
    key_cache: Tensor,  # [N, P, G, D]  same dtype
    value_cache: Tensor,  # [N, P, G, D]
    step: Mixed,
    scale: float,  # multiplies query·key before softmax
) -> Tensor:  # [T, H, D]
    """Return the attention of each token over the tokens of its sequence up to itself, by the kernels.

    Cost: as the two; where there are both, one more pass over the result.
    """
    first = 0 if step.decodes is None else step.decodes.context.shape[0]
    parts = []
    if step.decodes is not None:
        table, context = step.decodes.block_table, step.decodes.context
        parts.append(decode_attention_triton(query[:first], key_cache, value_cache, table, context, scale, FULL))
    if step.prefills is not None:
        table, context, starts = step.prefills.block_table, step.prefills.context, step.prefills.starts
        rest = query[first:]
        parts.append(prefill_attention_triton(rest, key_cache, value_cache, table, starts, context, scale, FULL))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


Attention = Callable[[Tensor, Tensor, Tensor, Mixed, float], Tensor]


def verify_invariance(
    apart: bool,  # whether sequences of one token go by decode
    heads: int,
    groups: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    cached_as: torch.dtype | None = None,  # None: as `dtype`
    attention: Attention = mixed_attention,
) -> bool:
    """Return whether a token has the same bits here as the last of its sequence alone, in the middle of a prompt, and
    beside others in a chunk that begins anywhere. What is not its own to see is poison."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = PROBED[-1] + 1
    blocks = -(-tokens // PAGE)
    query = torch.randn(tokens, heads, size, generator=generator, dtype=dtype, device=device)
    keys, values = (
        torch.randn(blocks + 1, PAGE, groups, size, generator=generator, dtype=dtype, device=device) for _ in "kv"
    )
    for cache in (keys, values):
        cache[-1] = torch.nan  # nobody's block
    keys, values = keys.to(cached_as or dtype), values.to(cached_as or dtype)
    scale = size**-0.5

    def attend(ranges: list[tuple[int, int]]) -> Tensor:
        """Return the attention of tokens start … stop − 1 of the one sequence, as if of several."""
        step = _probe(ranges, apart, blocks, device)
        return attention(torch.cat([query[a:b] for a, b in ranges]), keys, values, step, scale)

    whole = attend([(0, tokens)])
    ones = [(at, at + 1) for at in PROBED]
    chunks = [(3, 8), (SEGMENT - 9, SEGMENT + 40)]
    return all(
        torch.equal(attend(ranges), torch.cat([whole[a:b] for a, b in ranges]))
        for ranges in ([ones[-1]], ones, [*ones, *chunks], [chunks[1]], [(0, SEGMENT + 1)])
    )


def _probe(ranges: list[tuple[int, int]], apart: bool, blocks: int, device: torch.device) -> Mixed:
    """Return the step of ranges of one sequence; those of one token stand first."""

    def of(chosen: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        table = torch.arange(blocks, dtype=torch.int32).repeat(len(chosen), 1)
        for row, (_, stop) in enumerate(chosen):
            table[row, -(-stop // PAGE) :] = blocks  # poison
        counts = torch.tensor([0, *(stop - start for start, stop in chosen)])
        context = torch.tensor([stop for _, stop in chosen], dtype=torch.int32)
        return table.to(device), context.to(device), counts.cumsum(0).to(torch.int32).to(device)

    lone = [one for one in ranges if apart and one[1] - one[0] == 1]
    rest = [one for one in ranges if one not in lone]
    return Mixed(Decodes(*of(lone)[:2]) if lone else None, Prefills(*of(rest)) if rest else None)
