"""A pass through the layers, of few tokens, whose kernels are written down once and launched for every step like it.

What a kernel is given follows from how many tokens a step has and where its tensors lie. So they are put, each time,
where they lay when it was written down; which sequences, positions and blocks they name makes no difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.models.arithmetic import KVCache, Rotation
from engine.models.cpu_arithmetic import StepInputs
from kernels.team import recorded

MOST_TOKENS = 32  # of a step: more keep the kernels busy for longer than what is between them
MOST_PASSES = 8  # kept, those that were wanted last
BETWEEN = 8  # kernels, about a layer: then a step may give way

Layers = Callable[[StepInputs, Rotation, Tensor, Sequence[KVCache]], Tensor]


class _Shape(NamedTuple):
    tokens: int
    blocks: int  # of a sequence, at most
    threads: int
    caches: int  # where they lie


class RepeatedPass:
    """The kernels of a shape of step."""

    def __init__(self, layers: Layers, shape: _Shape, rotation: Rotation, embedded: Tensor, caches: Sequence[KVCache]):
        def integers(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int64)

        tokens = shape.tokens
        self._inputs = StepInputs(
            tokens=integers(tokens),
            positions=integers(tokens),
            slots=integers(tokens),
            block_table=integers(tokens, shape.blocks),
            sequences=integers(tokens),
            plans={},
        )
        self._rotation = Rotation(torch.empty_like(rotation.cos), torch.empty_like(rotation.sin))
        self._embedded = torch.empty_like(embedded)
        with recorded() as self._kernels:
            self._out = layers(self._inputs, self._rotation, self._embedded, caches)

    def run(self, inputs: StepInputs, rotation: Rotation, embedded: Tensor) -> Tensor:
        """Return what the layers make of a step of this shape. Raises StepInterrupted."""
        mine = self._inputs  # its tokens are not looked at: they are embedded already
        mine.positions.copy_(inputs.positions)
        mine.slots.copy_(inputs.slots)
        mine.sequences.copy_(inputs.sequences)
        sequences, blocks = inputs.block_table.shape
        mine.block_table[:sequences, :blocks] = inputs.block_table  # beyond, nothing is looked at
        self._rotation.cos.copy_(rotation.cos)
        self._rotation.sin.copy_(rotation.sin)
        self._embedded.copy_(embedded)
        self._kernels.run(inputs.give_way, BETWEEN)
        return self._out.clone()


class RepeatedPasses:
    """Those of one model, by shape. One thread at a time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Shape, RepeatedPass] = OrderedDict()

    def run(
        self, layers: Layers, inputs: StepInputs, rotation: Rotation, embedded: Tensor, caches: Sequence[KVCache]
    ) -> Tensor:
        """Return what the layers make of a step. Raises StepInterrupted."""
        blocks = 1 << (inputs.block_table.shape[1] - 1).bit_length()  # contexts grow, and the pass still does
        shape = _Shape(len(inputs.tokens), blocks, torch.get_num_threads(), caches[0].key.data_ptr())
        if shape not in self._kept:
            if len(self._kept) == MOST_PASSES:
                self._kept.popitem(last=False)
            self._kept[shape] = RepeatedPass(layers, shape, rotation, embedded, caches)
        self._kept.move_to_end(shape)
        return self._kept[shape].run(inputs, rotation, embedded)
