"""Mixture of experts, row by row: each token through its own experts, their outputs added in the router's order.

Registered with transformers under `NAME`; the products inside are `F.linear`, which products.py makes invariant. A
token's bits depend on it and on its experts alone: the rows of an expert are padded to whole vectors, and nothing is
added across tokens. Source: Shazeer et al., 2017; the layout of weights is that of `transformers.integrations.moe`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import UnsupportedModel
from engine.models.rows import missing_rows

NAME = "probity"


def experts(
    module: Any,  # gate_up_proj [E, 2I, H], down_proj [E, H, I], or transposed; _apply_gate
    hidden: Tensor,  # [T, H]
    chosen: Tensor,  # [T, k] int64, the experts of each token
    weights: Tensor,  # [T, k]
) -> Tensor:  # [T, H]
    """Return the weighted sum of each token's experts."""
    if not module.has_gate or module.has_post_expert_norm:
        raise UnsupportedModel(f"experts of the form `{type(module).__name__}` are not served")
    tokens, count = chosen.shape
    flat = chosen.reshape(-1)
    outputs = hidden.new_zeros(tokens * count, hidden.shape[-1])
    for expert in sorted(set(flat.tolist())):
        rows = (flat == expert).nonzero().squeeze(1)
        outputs[rows] = _expert(module, expert, hidden[rows // count])
    weighted = outputs.view(tokens, count, -1).float() * weights.float()[..., None]
    total = weighted[:, 0]
    for rank in range(1, count):
        total = total + weighted[:, rank]
    return total.to(hidden.dtype)


def _expert(module: Any, expert: int, rows: Tensor) -> Tensor:
    padded = F.pad(rows, (0, 0, 0, missing_rows(len(rows))))
    inner = module._apply_gate(_product(module, "gate_up_proj", expert, padded))
    return _product(module, "down_proj", expert, inner)[: len(rows)]


def _product(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(rows, weight.T if module.is_transposed else weight, bias)


def lay_out(module: nn.Module) -> None:
    """Lay transposed expert weights out so that each, transposed back, is contiguous: one layout, one product."""
    for child in module.modules():
        if getattr(child, "is_transposed", False):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(child, name)
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
