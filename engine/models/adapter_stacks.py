"""Adapters on a device: of each product one stack of all that have it, and which tokens of a step are whose.

An adapter that adds nothing to a product is not in its stack: rows that nothing is added to keep their bits. Products
that the same adapters have share their groups, which in practice is all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.models.arithmetic import Adapter
from kernels.grouped import Groups
from kernels.low_rank import LowRankStack, stack_low_rank

Names = tuple[str, ...]  # of adapters, as they stand in a stack


@dataclass(frozen=True, slots=True)
class Stacked:
    names: Names
    stack: LowRankStack


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """What adapters add in one step."""

    stacks: Mapping[tuple[int, str], Stacked]  # by layer and product
    groups: Mapping[Names, Groups]  # of the step's tokens; without those of whom none computes in it

    def of(self, layer: int, product: str) -> tuple[Groups, LowRankStack] | None:
        """Return which rows something is added to in a product, and what; None where nothing is."""
        stacked = self.stacks.get((layer, product)) if self.groups else None
        groups = self.groups.get(stacked.names) if stacked is not None else None
        return (groups, stacked.stack) if stacked is not None and groups is not None else None


class AdapterStacks:
    def __init__(self, adapters: Mapping[str, Adapter], device: torch.device) -> None:
        places = sorted(
            {(at, name) for one in adapters.values() for at, layer in enumerate(one.layers) for name in layer}
        )
        self.by_place: dict[tuple[int, str], Stacked] = {}
        for at, product in places:
            having = {name: one.layers[at][product] for name, one in adapters.items() if product in one.layers[at]}
            stack = stack_low_rank(list(having.values()))
            on_device = LowRankStack(stack.down.to(device), stack.up.to(device))
            self.by_place[at, product] = Stacked(tuple(having), on_device)
        self.kinds = sorted({stacked.names for stacked in self.by_place.values()})

    def rows_of(self, adapter_of: Iterable[str | None], kind: Names) -> list[npt.NDArray[np.generic]]:
        """Return, of a step's tokens by their adapters, `order` and `starts` of the groups of a kind."""
        index = {name: at for at, name in enumerate(kind)}
        group = np.array([index.get(name, len(kind)) if name is not None else len(kind) for name in adapter_of])
        order = np.argsort(group, kind="stable")
        starts = np.searchsorted(group[order], np.arange(len(kind) + 1))
        return [order[: starts[-1]].astype(np.int64), starts.astype(np.int32)]

    def step(self, groups: Mapping[Names, tuple[Tensor, Tensor]]) -> StepAdapters:
        """Return what adapters add in a step, from `order` and `starts` of its kinds on the device."""
        return StepAdapters(self.by_place, {kind: Groups(*rows) for kind, rows in groups.items() if len(rows[0])})
