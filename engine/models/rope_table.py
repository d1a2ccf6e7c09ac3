"""Rotary positions by table: what a borrowed module computes for a position, computed once for every position.

Asked anew in every step, the library's cosines could show where in memory a token lay. The table is made in pieces of
one size, so that its bits do not depend on how many positions are served.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.config import UnsupportedModel

PIECE = 256  # positions


class RopeTable(nn.Module):
    def __init__(self, original: nn.Module, positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        kinds = getattr(original, "rope_type", None)  # one for all layers, or one for each kind of layer
        layer_types = tuple(kinds) if isinstance(kinds, Mapping) else (None,)
        self._tables = {kind: _table(original, positions, dtype, kind) for kind in layer_types}

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, ...]:
        """Return what the original returns for `position_ids` [1, T]: cosines and sines, each [1, T, ·]."""
        if layer_type not in self._tables:
            raise UnsupportedModel(f"layers of `{layer_type}` have no rotary positions")
        return tuple(table[position_ids] for table in self._tables[layer_type])


@torch.inference_mode()
def _table(original: nn.Module, positions: int, dtype: torch.dtype, layer_type: str | None) -> tuple[Tensor, ...]:
    options = {} if layer_type is None else {"layer_type": layer_type}
    x = torch.zeros(1, dtype=dtype)
    pieces = [original(x, torch.arange(start, start + PIECE)[None], **options) for start in range(0, positions, PIECE)]
    return tuple(torch.cat([part[0] for part in parts])[:positions] for parts in zip(*pieces, strict=True))
