"""From a model directory to parameters and a model version: every file is hashed, every weight accounted for.

A version's digest covers what an answer depends on: weights, configuration, tokenizer and chat template. One example:

    sha256:7a… = SHA-256("probity/model/v1\\nweights sha256:e3…\\nconfig sha256:0b…\\ntokenizer sha256:51…\\n
                          template sha256:9c…\\n")

With an adapter (adapters.py) a last line follows: adapter sha256:d4…\\n

Reads the Hugging Face layout: config.json, generation_config.json, *.safetensors (with an index if sharded). All of it
goes through one reading (reading.py), so that the version is that of the bytes the parameters are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.chat_template import chat_template
from engine.reading import Progress, Reading, WeightsError, silently
from engine.request import ModelVersion
from engine.shard import Shard, Stored

CASTABLE = (torch.bfloat16, torch.float16, torch.float32)
_CAST_FROM = {torch.float16: "float16", torch.float32: "float32"}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TIED_HEAD = "lm_head.weight"  # may be stored beside the embedding it is tied to


def read_model(directory: Path, progress: Progress = silently) -> Reading:
    """Begin the reading of a model's directory. Raises WeightsError."""
    if not directory.is_dir():
        raise WeightsError(f"`{directory.name}` is not a directory; give the path of a Hugging Face model directory")
    return Reading(directory, progress)


# --- parameters ---


@dataclass(frozen=True, slots=True)
class Weights:
    tensors: dict[str, Tensor]  # bfloat16, by name
    cast: tuple[str, ...]  # the types that some were stored in and were cast from, in order: `float16`, `float32`


def load_parameters(reading: Reading, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Return the parameters of `shapes`.

    Raises:
        WeightsError: a weight is missing, is one too many, has another shape or a type that cannot be cast; or a file
            cannot be read, or was changed meanwhile.
    """
    weights = _load(reading, lambda one: _is_wanted(one, shapes))
    missing = sorted(shapes.keys() - weights.tensors.keys())
    if missing:
        raise WeightsError(f"the weight `{missing[0]}` is missing ({len(missing)} in all)")
    return weights


def load_tensors(reading: Reading) -> Weights:
    """Return every weight of the checkpoint. Raises WeightsError."""
    return _load(reading, _is_castable)


def _load(reading: Reading, is_wanted: Callable[[Stored], bool]) -> Weights:
    """Read all weight files, in order of name, and keep what is wanted. `is_wanted` raises before anything is read."""
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for file in _shard_names(reading):
        with reading.stream(file) as stream:
            shard = Shard(stream)
            for one in shard.weights:
                if one.name in kinds:
                    raise WeightsError(f"the weight `{one.name}` is stored twice")
                kinds[one.name] = one.kind
            wanted = {one.name for one in shard.weights if is_wanted(one)}
            tensors |= {one.name: tensor.to(torch.bfloat16) for one, tensor in shard.read() if one.name in wanted}
    return Weights(tensors, tuple(sorted(_CAST_FROM[kind] for kind in set(kinds.values()) & _CAST_FROM.keys())))


def weights_size(reading: Reading) -> int:
    """Return the bytes of the weight files that are there."""
    return sum(reading.size(name) for name in _shard_names(reading))


def _shard_names(reading: Reading) -> list[str]:
    if not reading.has(INDEX):
        return [SINGLE]
    named = reading.json(INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise WeightsError(f"`{INDEX}` does not name the files of the weights")
    return sorted(set(named.values()))  # a path to elsewhere is no name in the directory, so that it is missing


def _is_wanted(one: Stored, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    wanted = shapes.get(one.name)
    if wanted is None:
        if one.name == TIED_HEAD:
            return False
        raise WeightsError(f"the weight `{one.name}` is not one of this architecture")
    if one.shape != wanted:
        raise WeightsError(f"the weight `{one.name}` has shape {list(one.shape)}, not {list(wanted)}")
    return _is_castable(one)


def _is_castable(one: Stored) -> bool:
    if one.kind not in CASTABLE:
        raise WeightsError(f"the weight `{one.name}` is {one.kind}, which is not cast to bfloat16")
    return True


# --- the version ---


def digest_directory(directory: Path) -> ModelVersion:
    """Return the version of the model in `directory`. Raises WeightsError."""
    return version_of(read_model(directory))


def version_of(reading: Reading) -> ModelVersion:
    """Return the version of what was read; what of it was not read yet is read now.

    Raises:
        WeightsError: a file is missing or cannot be read, or one that was read is not what it was any more.
    """
    weights = joined_digest(reading, _shard_names(reading))
    config = joined_digest(reading, ["config.json", *_present(reading, "generation_config.json")])
    tokenizer = joined_digest(reading, ["tokenizer.json", *_present(reading, "tokenizer_config.json")])
    template = "sha256:" + hashlib.sha256(chat_template(reading).encode()).hexdigest()
    reading.verify_unchanged()
    version = ModelVersion(reading.directory.name, "", weights, config, tokenizer, template)
    return replace(version, digest=version_digest(version))


def version_digest(version: ModelVersion) -> str:
    """Return what `version.digest` must be."""
    text = (
        f"probity/model/v1\nweights {version.weights}\nconfig {version.config}\n"
        f"tokenizer {version.tokenizer}\ntemplate {version.template}\n"
    )
    if version.adapter is not None:
        text += f"adapter {version.adapter.digest}\n"
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def joined_digest(reading: Reading, names: Iterable[str]) -> str:
    """Return the digest over (digest, name) of files, in the order given. Raises WeightsError."""
    text = "".join(f"{reading.digest(name)} {name}\n" for name in names)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _present(reading: Reading, name: str) -> list[str]:
    return [name] if reading.has(name) else []
