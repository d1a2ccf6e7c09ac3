"""What a runner asks of a model: its shape, and the way from tokens to logits. See decoder.py and borrowed.py."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.models.arithmetic import KVCache, Taken


class ModelShape(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding windows of its layers, in keys; none where every layer sees all that came before."""
        ...


class Model(Protocol[Taken]):
    @property
    def config(self) -> ModelShape: ...

    def hidden(self, inputs: Taken, caches: list[KVCache]) -> Tensor:
        """Return the hidden states, [T, H]; keys and values are stored on the way."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] float32 of hidden states [R, H]; R may be 0."""
        ...
