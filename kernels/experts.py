"""A mixture of experts: each token through the experts chosen for it, their outputs added up by their weights.

    out = Σ over choices c, in order, of weight[c] · down_e(silu(gate_e(x)) · up_e(x)),   e = chosen[c]

Three launches on a GPU: the gated products of all pairs of token and choice, expert by expert; the products back, in
the pairs' own places; the sum of each token's. Knows nothing of how experts are chosen: route.py does.

Numeric contract: a token's bits depend on it, its choices in their order and the weights alone. Nothing is added by
whichever program comes first: a pair's output has a place of its own, rounded to the dtype, and a token's are added in
float32 in the order of its choices, then rounded once. Source: Shazeer et al., 2017; Gale et al., MLSys 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gemm import gemm_reference, gemm_silu_mul_reference
from kernels.grouped import Groups, group_rows, grouped_product
from kernels.jit import INTERPRETED, Pointer, jit, narrow, tl
from kernels.launch import device_of, launch_for
from kernels.shape import ShapeError, check_layout, check_shape


def experts(
    x: Tensor,  # [T, H]  bfloat16 or float16
    gate_up: Tensor,  # [E, 2I, H]  same dtype; gate, then up
    down: Tensor,  # [E, H, I]  same dtype
    chosen: Tensor,  # [T, C] int64, 0 ≤ expert < E
    weights: Tensor,  # [T, C] float32
) -> Tensor:  # [T, H]
    """Return each token's weighted sum over the experts chosen for it.

    Raises:
        ShapeError: an argument disagrees with the shapes above.

    Cost: 6 · C · H · I operations a token; the weights of every expert that is chosen, once for each of its tiles.
    """
    _check(x, gate_up, down, chosen, weights)
    choices = chosen.shape[1]
    groups = group_rows(chosen.reshape(-1), gate_up.shape[0])
    inner, outer = x.new_empty(chosen.numel(), down.shape[2]), x.new_empty(chosen.numel(), x.shape[1])
    _through(x, gate_up, down, groups, inner, outer, choices)
    outputs = outer.view(*chosen.shape, x.shape[1])
    return combine_triton(outputs, weights) if x.is_cuda else combine(outputs, weights)


def _through(
    x: Tensor, gate_up: Tensor, down: Tensor, groups: Groups, inner: Tensor, outer: Tensor, choices: int
) -> None:
    grouped_product(x, gate_up, groups, inner, choices, silu=True)
    grouped_product(inner, down, groups, outer)


def combine(
    outputs: Tensor,  # [T, C, H]
    weights: Tensor,  # [T, C] float32
) -> Tensor:  # [T, H]
    """Return each token's outputs added up by weight, in the order of its choices."""
    total = torch.zeros(outputs.shape[0], outputs.shape[2], dtype=torch.float32, device=outputs.device)
    for choice in range(outputs.shape[1]):
        total += weights[:, choice, None] * outputs[:, choice].float()
    return total.to(outputs.dtype)


def combine_triton(outputs: Tensor, weights: Tensor) -> Tensor:
    """Return `combine` by the kernel."""
    tokens, choices, width = outputs.shape
    out = outputs.new_empty(tokens, width)
    if out.numel():
        launch = launch_for("experts", width, device_of(outputs))
        _combine_kernel[(tokens, -(-width // launch.block_n))](
            outputs.contiguous(),
            weights.contiguous(),
            out,
            CHOICES=choices,
            WIDTH=width,
            BLOCK=launch.block_n,
            PLAIN=INTERPRETED,
            **launch.options,
        )
    return out


@jit
def _combine_kernel(
    outputs: Pointer,  # [T, CHOICES, WIDTH]
    weights: Pointer,  # [T, CHOICES] float32
    out: Pointer,  # [T, WIDTH]
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(CHOICES):
        pair = token * CHOICES + choice
        output = tl.load(outputs + pair * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * output
    tl.store(out + token * WIDTH + column, narrow(total, out.dtype.element_ty, PLAIN), mask=inside)


def experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the same token by token in float64, rounded where the definition rounds."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token in range(x.shape[0]):
        for choice, expert in enumerate(chosen[token].tolist()):
            inner = gemm_silu_mul_reference(x[token : token + 1], gate_up[expert])
            output = gemm_reference(inner, down[expert])
            out[token] += weights[token, choice].double() * output[0].double()
    return out.to(x.dtype)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> None:
    if x.ndim != 2 or down.ndim != 3:
        raise ShapeError(f"`x` {list(x.shape)} and `down` {list(down.shape)} are not [T, H] and [E, H, I]")
    count, _, inner = down.shape
    check_shape("down", down, count, x.shape[1], inner)
    check_shape("gate_up", gate_up, count, 2 * inner, x.shape[1])
    if chosen.ndim != 2 or chosen.shape[1] < 1:
        raise ShapeError(f"`chosen` has shape {list(chosen.shape)}, not [T, C]")
    check_shape("chosen", chosen, x.shape[0], chosen.shape[1])
    check_shape("weights", weights, *chosen.shape)
    check_layout("weights", weights, torch.float32)
