"""Which experts a token goes through, and by which weights: the C highest of its scores, highest first.

    weight[c] = exp(score[c]) / Σ exp(score)      over the chosen, or over all experts

Over the chosen it is what Mixtral, GPT-OSS and Qwen3-MoE (`norm_topk_prob`) do. Ties go to the lowest expert. Knows no
expert's weights: experts.py takes it from here.

Numeric contract: a row's choice and bits depend on its scores alone. On a GPU one program takes a row: the highest left
is looked for C times, which has no order; over the chosen the weights are added up from the highest to the lowest, over
all experts in an order fixed by their number and the launch table. Float32 throughout. What is not a number is chosen
last, and shows in the weights. Nothing is asked of the host, nor by `group_rows`, which comes next.
Source: Shazeer et al., 2017 (noise aside).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_state import finite
from kernels.jit import Pointer, jit, tl
from kernels.launch import device_of, launch_for, power_of_two
from kernels.shape import ShapeError

MOST_CHOICES = 32


def route(
    scores: Tensor,  # [T, E]  finite or −∞, one of a row finite
    choices: int,  # C, 1 … 32, ≤ E
    over_chosen: bool = True,  # the weights of a token add up to 1; else those of all experts would
) -> tuple[Tensor, Tensor]:  # [T, C] int64, [T, C] float32
    """Return each token's experts, and their weights.

    Raises:
        ShapeError: `scores` is not [T, E], or has fewer experts than `choices`.

    Cost: one pass over the scores.
    """
    if scores.ndim != 2:
        raise ShapeError(f"`scores` has shape {list(scores.shape)}, not [T, E]")
    if not 1 <= choices <= min(MOST_CHOICES, scores.shape[1]):
        raise ShapeError(f"`choices` is {choices}, not 1 … {min(MOST_CHOICES, scores.shape[1])}")
    if scores.is_cuda:
        return route_triton(scores, choices, over_chosen)
    wide = scores.float()
    chosen = _ranked(wide)[:, :choices]
    if over_chosen:
        return chosen, torch.softmax(wide.gather(1, chosen), dim=-1)
    return chosen, torch.softmax(wide, dim=-1).gather(1, chosen)


def _ranked(scores: Tensor) -> Tensor:
    """Return the experts of each row, highest first; what is not a number last."""
    ruled_out = scores.masked_fill(scores.isnan(), -torch.inf)
    order = torch.sort(ruled_out, dim=-1, descending=True, stable=True).indices
    last = torch.sort(scores.isnan().gather(1, order).int(), dim=-1, stable=True).indices
    return order.gather(1, last)


def route_triton(scores: Tensor, choices: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
    """Return `route` by the kernel."""
    tokens, count = scores.shape
    chosen = torch.empty(tokens, choices, dtype=torch.int64, device=scores.device)
    weights = torch.empty(tokens, choices, dtype=torch.float32, device=scores.device)
    if tokens:
        _route_kernel[(tokens,)](
            scores.contiguous(),
            chosen,
            weights,
            COUNT=count,
            BLOCK=power_of_two(count),
            CHOICES=choices,
            CHOICE_BLOCK=power_of_two(choices),
            OVER_CHOSEN=over_chosen,
            **launch_for("route", count, device_of(scores)).options,
        )
    return chosen, weights


@jit
def _route_kernel(
    scores: Pointer,  # [T, COUNT]
    chosen: Pointer,  # [T, CHOICES] int64
    weights: Pointer,  # [T, CHOICES] float32
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
    CHOICE_BLOCK: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    expert, choice = tl.arange(0, BLOCK), tl.arange(0, CHOICE_BLOCK)
    present = expert < COUNT
    score = tl.load(scores + row * COUNT + expert, mask=present, other=float("-inf")).to(tl.float32)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the same order, −∞ above these two
    left = tl.where(present, tl.where(score == score, key, -0x7FFFFFFF), -0x80000000)
    shift = finite(tl.max(tl.where(score == score, score, float("-inf")), axis=0))
    ids = tl.zeros((CHOICE_BLOCK,), tl.int64)
    kept = tl.zeros((CHOICE_BLOCK,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for rank in range(CHOICES):
        best = tl.min(tl.where(left == tl.max(left, axis=0), expert, BLOCK), axis=0)
        weight = tl.exp(tl.sum(tl.where(expert == best, score, 0.0), axis=0) - shift)
        left = tl.where(expert == best, -0x80000000, left)
        ids = tl.where(choice == rank, best.to(tl.int64), ids)
        kept = tl.where(choice == rank, weight, kept)
        total += weight
    if not OVER_CHOSEN:
        total = tl.sum(tl.where(present, tl.exp(score - shift), 0.0), axis=0)
    at = row * CHOICES + choice
    tl.store(chosen + at, ids, mask=choice < CHOICES)
    tl.store(weights + at, kept / total, mask=choice < CHOICES)


def route_reference(scores: Tensor, choices: int, over_chosen: bool = True) -> tuple[Tensor, Tensor]:
    """Return the same token by token in float64, on the CPU."""
    chosen, weights = [], []
    for row in scores.double().cpu().tolist():
        experts = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:choices]
        exponentials = (torch.tensor(row, dtype=torch.float64) - max(row)).exp()
        total = exponentials[experts].sum() if over_chosen else exponentials.sum()
        chosen.append(experts)
        weights.append(exponentials[experts] / total)
    return torch.tensor(chosen, dtype=torch.int64), torch.stack(weights).float()
