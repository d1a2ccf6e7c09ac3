"""From a model directory to a model: natively where decoder.py knows the family, else by transformers' own code.

A family that decoder.py knows, with a feature that it does not (a window, another rope), goes the second way too.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import probe
from engine.config import UnsupportedModel
from engine.model_runner import LinearAsMet, LinearByShape, choose_linears, choose_segment
from engine.models.borrowed import BorrowedModel, build
from engine.models.borrowed_config import BorrowedConfig, model_class
from engine.models.decoder import ARCHITECTURES, Decoder, DecoderConfig, parameter_shapes
from engine.models.model import Model
from engine.models.rows import missing_rows
from engine.numeric_policy import numeric_policy
from engine.reading import Reading
from engine.weights import load_parameters, load_tensors
from kernels.paged_attention import SEGMENTS


class HandedOver(Mapping[str, Tensor]):
    """Parameters, each of which is given out once and then forgotten: who lays it out anew does not hold it twice."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Take what is in `tensors` out of it, by and by."""
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.pop(name)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    policy: Mapping[str, object]  # the numeric policy
    cast: tuple[str, ...]  # the types that weights were cast from


def load_model(reading: Reading, most_rows: int, context_length: int | None = None) -> LoadedModel:
    """Load the model of a directory. At most `most_rows` tokens will be in a step.

    Raises: EngineStartError and its kinds.
    """
    config = configuration(reading.json("config.json"), context_length)
    if isinstance(config, DecoderConfig):
        return _native(reading, config, most_rows)
    return _borrowed(reading, config, most_rows, context_length)


def configuration(values: Mapping[str, Any], context_length: int | None = None) -> DecoderConfig | BorrowedConfig:
    """Return how the model of a `config.json` is served. Raises UnsupportedModel."""
    native = (values.get("architectures") or ["none"])[0] in ARCHITECTURES
    try:
        return DecoderConfig.from_json(values)
    except UnsupportedModel as refused:
        try:
            return BorrowedConfig.from_json(values, context_length)
        except UnsupportedModel:
            if native:  # what the family's own page says of it is the better answer
                raise refused from None
            raise


def _native(reading: Reading, config: DecoderConfig, most_rows: int) -> LoadedModel:
    segment = choose_segment(config)
    linears = choose_linears(config, most_rows)
    weights = load_parameters(reading, parameter_shapes(config))
    linear = LinearByShape(linears)
    decoder = Decoder(config, HandedOver(weights.tensors), linear, SEGMENTS[segment], linear.pack)
    return LoadedModel(decoder, numeric_policy(linears, segment), weights.cast)


def _borrowed(reading: Reading, config: BorrowedConfig, most_rows: int, context_length: int | None) -> LoadedModel:
    segment = choose_segment(config)
    linear = LinearAsMet(most_rows + missing_rows(most_rows))
    weights = load_tensors(reading)
    module = build(config, weights.tensors)
    tokens = probe.probe_tokens(config.vocab_size, config.windows, config.max_position_embeddings)
    expected = probe.reference(module, tokens)
    positions = max(min(context_length or sys.maxsize, config.max_position_embeddings), len(tokens))
    model = BorrowedModel(config, module, linear, SEGMENTS[segment], positions)
    probe.verify(model, tokens, expected)
    linears = {shape: name for (shape, kind), name in linear.chosen.items() if kind == torch.bfloat16}
    return LoadedModel(model, numeric_policy(linears, segment, _provenance(config, linear)), weights.cast)


def _provenance(config: BorrowedConfig, linear: LinearAsMet) -> dict[str, object]:
    """Return whose code the layers are, and the products that are not in bfloat16."""
    source = sys.modules[model_class(config.architecture).__module__].__file__
    assert source is not None  # transformers is installed as files
    others = {f"{n}x{k} {kind}": name for ((n, k), kind), name in linear.chosen.items() if kind != torch.bfloat16}
    return {
        "architecture": config.architecture,
        "transformers": metadata.version("transformers"),
        "source": "sha256:" + hashlib.sha256(Path(source).read_bytes()).hexdigest(),
        "linear": others,
    }
