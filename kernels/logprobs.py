"""Log-probabilities of chosen tokens and of the likeliest, from logits, no softmax of the vocabulary ever written.

    logprob(t) = (logit(t) − m) − log Σ exp(logit − m)      m the row's highest logit; float32

A row is read once, in parts: each gives its highest logit, the sum of exponentials below that, and its best tokens; a
second kernel brings those together. Ties go to the lowest id.

Numeric contract: a row's bits depend on that row alone. Each part is added up by one program and the parts by one more,
in orders fixed by the vocabulary and the launch table; which tokens are the likeliest has no order. It differs in the
last bits from the library's log-softmax, which the engine uses on a CPU: another numeric policy. What a kernel and the
plain version share is the formula. Source: Milakov and Gimelshein, 2018 (sums of parts brought to one maximum).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jit import Block, Pointer, jit, tl
from kernels.launch import device_of, launch_for, power_of_two
from kernels.shape import ShapeError, check_shape

MOST_ALTERNATIVES = 32


@dataclass(frozen=True, slots=True)
class Logprobs:
    selected: Tensor  # [R] float32, of the token asked for
    top_ids: Tensor  # [R, A] int32, likeliest first
    top: Tensor  # [R, A] float32, theirs


def logprobs(
    logits: Tensor,  # [R, V] float32, finite or −∞, one of a row finite
    tokens: Tensor,  # [R] int64, 0 ≤ token < V
    alternatives: int,  # A, 0 … 32, ≤ V
) -> Logprobs:
    """Return the log-probability of each row's token, and of its `alternatives` likeliest.

    Raises:
        ShapeError: an argument disagrees with the shapes above.

    Cost: one pass over the logits; bound by memory bandwidth.
    """
    if logits.ndim != 2 or logits.shape[1] < 1 or logits.dtype != torch.float32:
        raise ShapeError(f"`logits` {list(logits.shape)} of {logits.dtype} are not [R, V] float32")
    check_shape("tokens", tokens, logits.shape[0])
    if not 0 <= alternatives <= min(MOST_ALTERNATIVES, logits.shape[1]):
        raise ShapeError(f"`alternatives` is {alternatives}, not 0 … {min(MOST_ALTERNATIVES, logits.shape[1])}")
    if logits.is_cuda:
        return logprobs_triton(logits, tokens, alternatives)
    return _looked_up(torch.log_softmax(logits, dim=-1), logits, tokens, alternatives)


def _looked_up(every: Tensor, logits: Tensor, tokens: Tensor, alternatives: int) -> Logprobs:
    """Return what is asked of the log-probabilities of all tokens; the likeliest are those of the highest logits."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :alternatives]
    return Logprobs(every.gather(1, tokens[:, None]).squeeze(1), order.int(), every.gather(1, order))


def logprobs_triton(logits: Tensor, tokens: Tensor, alternatives: int) -> Logprobs:
    """Return `logprobs` by the kernels."""
    rows, width = logits.shape
    launch = launch_for("logprobs", width, device_of(logits))
    parts, kept = -(-width // launch.block_n), max(1, alternatives)  # the best of a part is its maximum

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    sums, best, best_ids = new(rows, parts), new(rows, parts, kept), new(rows, parts, kept, dtype=torch.int32)
    out = Logprobs(new(rows), new(rows, alternatives, dtype=torch.int32), new(rows, alternatives))
    if rows == 0:
        return out
    logits = logits.contiguous()
    _part_kernel[(rows, parts)](
        logits,
        sums,
        best,
        best_ids,
        WIDTH=width,
        PARTS=parts,
        KEPT=kept,
        BLOCK=launch.block_n,
        **launch.options,
    )
    _whole_kernel[(rows,)](
        logits,
        tokens.contiguous(),
        sums,
        best,
        best_ids,
        out.selected,
        out.top_ids,
        out.top,
        WIDTH=width,
        PARTS=parts,
        KEPT=kept,
        ALTERNATIVES=alternatives,
        PART_BLOCK=power_of_two(parts),
        BLOCK=power_of_two(parts * kept),
        **launch.options,
    )
    return out


@jit
def _part_kernel(
    logits: Pointer,  # [R, WIDTH] float32
    sums: Pointer,  # [R, PARTS] float32
    best: Pointer,  # [R, PARTS, KEPT] float32, highest first; where a part has fewer tokens, −∞
    best_ids: Pointer,  # [R, PARTS, KEPT] int32; there, WIDTH
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    logit = tl.load(logits + row * WIDTH + column, mask=inside, other=float("-inf"))
    highest = tl.max(logit, axis=0)
    weight = tl.where(logit > float("-inf"), tl.exp(logit - _finite(highest)), 0.0)
    tl.store(sums + row * PARTS + part, tl.sum(weight, axis=0))
    at = (row * PARTS + part) * KEPT
    ids = tl.where(inside, column, WIDTH)
    for place in range(KEPT):
        value, token, ids = _next(logit, ids, WIDTH)
        tl.store(best + at + place, value)
        tl.store(best_ids + at + place, token)


@jit
def _whole_kernel(
    logits: Pointer,  # [R, WIDTH] float32
    tokens: Pointer,  # [R] int64
    sums: Pointer,  # [R, PARTS]
    best: Pointer,  # [R, PARTS, KEPT]
    best_ids: Pointer,  # [R, PARTS, KEPT]
    selected: Pointer,  # [R] float32
    top_ids: Pointer,  # [R, ALTERNATIVES] int32
    top: Pointer,  # [R, ALTERNATIVES] float32
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
    ALTERNATIVES: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PART_BLOCK)
    highest = tl.load(best + (row * PARTS + part) * KEPT, mask=part < PARTS, other=float("-inf"))
    most = tl.max(highest, axis=0)
    scale = tl.where(highest > float("-inf"), tl.exp(highest - most), 0.0)
    total = tl.sum(tl.load(sums + row * PARTS + part, mask=part < PARTS, other=0.0) * scale, axis=0)
    share = tl.log(total)
    asked = tl.load(logits + row * WIDTH + tl.load(tokens + row))
    tl.store(selected + row, asked - most - share)
    if ALTERNATIVES > 0:
        place = tl.arange(0, BLOCK)
        inside = place < PARTS * KEPT
        logit = tl.load(best + row * PARTS * KEPT + place, mask=inside, other=float("-inf"))
        ids = tl.load(best_ids + row * PARTS * KEPT + place, mask=inside, other=WIDTH)
        for at in range(ALTERNATIVES):
            value, token, ids = _next(logit, ids, WIDTH)
            tl.store(top_ids + row * ALTERNATIVES + at, token)
            tl.store(top + row * ALTERNATIVES + at, value - most - share)


@jit
def _next(logit: Block, ids: Block, WIDTH: tl.constexpr) -> tuple[Block, Block, Block]:
    """Return the highest logit of those with an id below WIDTH, the lowest id that has it, and the ids without it."""
    value = tl.max(tl.where(ids < WIDTH, logit, float("-inf")), axis=0)
    token = tl.min(tl.where(logit == value, ids, WIDTH), axis=0)
    return value, token, tl.where(ids == token, WIDTH, ids)


@jit
def _finite(value: Block) -> Block:
    return tl.where(value > float("-inf"), value, 0.0)


def logprobs_reference(logits: Tensor, tokens: Tensor, alternatives: int) -> Logprobs:
    """Return the same in float64, rounded once, on the CPU."""
    wide = logits.double().cpu()
    every = (wide - torch.logsumexp(wide, dim=-1, keepdim=True)).float()
    return _looked_up(every, wide, tokens.cpu(), alternatives)
