"""A file of weights in the format of safetensors, read once from front to back.

    8 bytes   N, the length of the header, little-endian
    N bytes   the header: {"__metadata__": {"format": "pt"},
                           "model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}, …}
    the rest  the weights, as the offsets say, which leave no byte out and give none to two

Each weight is read into memory of its own, which goes when it goes: a file of 5 GB is never there beside its weights.

Source: Hugging Face safetensors, its description of the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.reading import EndsEarly, Stream, WeightsError

MAX_HEADER = 100_000_000  # bytes, as safetensors has it
MAX_DIMENSIONS = 16
METADATA = "__metadata__"
_KINDS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ShardError(WeightsError):
    """A file is not safetensors."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a header says of a weight."""

    name: str
    kind: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the header's end
    end: int


class Shard:
    """The weights of a stream, which is at its beginning."""

    def __init__(self, stream: Stream) -> None:
        """Read the header. Raises ShardError."""
        self._stream = stream
        try:
            length = int.from_bytes(stream.take(8), "little")
            if length > MAX_HEADER:
                raise self._error(f"its header has more than {MAX_HEADER:,} bytes")
            header = json.loads(stream.take(length))
        except (EndsEarly, ValueError, RecursionError) as error:
            raise self._error("its header cannot be read") from error
        if not isinstance(header, dict):
            raise self._error("its header is not an object")
        entries = [self._entry(name, said) for name, said in header.items() if name != METADATA]
        self.weights = sorted(entries, key=lambda one: (one.begin, one.end))  # in the order of the file
        self._check_covered()

    def read(self) -> Iterator[tuple[Stored, Tensor]]:
        """Yield each weight, in the order of the file. Raises EndsEarly."""
        for one in self.weights:
            raw = torch.empty(one.end - one.begin, dtype=torch.uint8)
            self._stream.fill(raw.numpy().data)
            yield one, raw.view(one.kind).reshape(one.shape)

    def _entry(self, name: str, said: Any) -> Stored:
        try:
            kind, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._error(f"its header says not enough of `{name}`") from error
        if not isinstance(kind, str) or kind not in _KINDS:
            raise self._error(f"the type of `{name}` is not known")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, [*shape, begin, end])):
            raise self._error(f"its header gives `{name}` an impossible shape")
        if end - begin != math.prod(shape) * _KINDS[kind].itemsize:
            raise self._error(f"its header gives `{name}` more or fewer bytes than its shape has")
        return Stored(name, _KINDS[kind], tuple(shape), begin, end)

    def _check_covered(self) -> None:
        """Every byte behind the header is one weight's: none is hashed that is nobody's, none is two's."""
        at = 0
        for one in self.weights:
            if one.begin != at:
                raise self._error(f"`{one.name}` does not begin where the weight before it ends")
            at = one.end
        if at != self._stream.size - self._stream.position:
            raise self._error("it is longer or shorter than its header says")

    def _error(self, reason: str) -> ShardError:
        return ShardError(f"`{self._stream.name}` cannot be read as safetensors: {reason}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62
