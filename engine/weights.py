"""From a model directory to parameters and a model version: every file is hashed, every weight accounted for.

A version's digest covers what an answer depends on: weights, configuration, tokenizer and chat template. One example:

    sha256:7a… = SHA-256("probity/model/v1\\nweights sha256:e3…\\nconfig sha256:0b…\\ntokenizer sha256:51…\\n
                          template sha256:9c…\\n")

With an adapter (adapters.py) a last line follows: adapter sha256:d4…\\n

Reads the Hugging Face layout: config.json, generation_config.json, *.safetensors (with an index if sharded).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import EngineStartError
from engine.request import ModelVersion

CASTABLE = (torch.bfloat16, torch.float16, torch.float32)
_CAST_FROM = {"F16": "float16", "F32": "float32"}  # as safetensors names them
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightsError(EngineStartError):
    """A file of the model directory is missing, unreadable, or not what the configuration says."""


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of the directory. Raises WeightsError."""
    try:
        value = json.loads((directory / name).read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(f"`{name}` is missing in the model directory") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"`{name}` of the model directory cannot be read") from error
    if not isinstance(value, dict):
        raise WeightsError(f"`{name}` of the model directory is not an object")
    return value


def shards(directory: Path) -> list[Path]:
    """Return the weight files, in order of name. Raises WeightsError."""
    if (directory / INDEX).exists():
        names = sorted(set(read_json(directory, INDEX).get("weight_map", {}).values()))
    else:
        names = [SINGLE]
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise WeightsError(f"`{name}` is missing in the model directory")
    return [directory / name for name in names]


def load_parameters(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the parameters of `shapes`, in bfloat16.

    Raises:
        WeightsError: a weight is missing, is one too many, has another shape or a type that cannot be cast.
    """
    parameters = {name: _checked(name, tensor, shapes) for name, tensor in _stored(directory)}
    missing = sorted(shapes.keys() - parameters.keys())
    if missing:
        raise WeightsError(f"the weight `{missing[0]}` is missing ({len(missing)} in all)")
    return {name: parameters[name] for name in shapes}


def load_tensors(directory: Path) -> dict[str, Tensor]:
    """Return every weight of the checkpoint, in bfloat16, by its name there. Raises WeightsError."""
    return {name: _cast(name, tensor) for name, tensor in _stored(directory)}


def _stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight as it is stored, no name twice."""
    names: set[str] = set()
    for path in shards(directory):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in names:
                    raise WeightsError(f"the weight `{name}` is stored twice")
                names.add(name)
                yield name, file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"`{path.name}` cannot be read as safetensors") from error


def cast_from(directory: Path) -> tuple[str, ...]:
    """Return the types of stored weights that loading casts. Reads headers alone. Raises WeightsError."""
    found: set[str] = set()
    for path in shards(directory):
        with _opened(path) as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    return tuple(sorted(_CAST_FROM[kind] for kind in found & _CAST_FROM.keys()))


def _checked(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    wanted = shapes.get(name)
    if wanted is None:
        # A tied head may be stored beside the embedding it is tied to.
        if name == "lm_head.weight":
            return tensor
        raise WeightsError(f"the weight `{name}` is not one of this architecture")
    if tuple(tensor.shape) != wanted:
        raise WeightsError(f"the weight `{name}` has shape {list(tensor.shape)}, not {list(wanted)}")
    return _cast(name, tensor)


def _cast(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in CASTABLE:
        raise WeightsError(f"the weight `{name}` is {tensor.dtype}, which is not cast to bfloat16")
    return tensor.to(torch.bfloat16)


def digest_directory(directory: Path) -> ModelVersion:
    """Return the version of the model in `directory`. Raises WeightsError."""
    if not directory.is_dir():
        raise WeightsError(f"`{directory.name}` is not a directory; give the path of a Hugging Face model directory")
    weights = joined_digest((path.name, file_digest(path)) for path in shards(directory))
    config = joined_digest((name, file_digest(directory / name)) for name in _present(directory, _CONFIG_FILES))
    tokenizer = joined_digest((name, file_digest(directory / name)) for name in _present(directory, _TOKENIZER_FILES))
    template = "sha256:" + hashlib.sha256(chat_template(directory).encode()).hexdigest()
    version = ModelVersion(directory.resolve().name, "", weights, config, tokenizer, template)
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


_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def chat_template(directory: Path) -> str:
    """Return the chat template, or nothing where the model has none."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = read_json(directory, "tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    return str(template)


def _present(directory: Path, names: tuple[str, ...]) -> list[str]:
    if not (directory / names[0]).is_file():
        raise WeightsError(f"`{names[0]}` is missing in the model directory")
    return [name for name in names if (directory / name).is_file()]


def file_digest(path: Path) -> str:
    """Raises WeightsError."""
    try:
        with path.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"`{path.name}` cannot be read") from error


def joined_digest(files: Iterable[tuple[str, str]]) -> str:
    """Return the digest over (name, digest) of files, in the order given."""
    text = "".join(f"{digest} {name}\n" for name, digest in files)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
