"""The configuration of a family whose arithmetic is transformers' own, and the refusal by name of what is not exact.

What an architecture does beyond this page is found out by running it, see borrowed.py and probe.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.config import UnsupportedModel
from kernels.attention_plan import ROWS

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class BorrowedConfig:
    architecture: str  # the class in transformers
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_types: tuple[str, ...] | None  # by layer; None: the family does not say
    windows: tuple[int, ...]  # keys
    source: Mapping[str, Any]  # `config.json`, which the class reads by itself

    @classmethod
    def from_json(cls, values: Mapping[str, Any], context_length: int | None = None) -> BorrowedConfig:
        """Read a Hugging Face configuration. `context_length` is the most that will be asked of it.

        Raises:
            UnsupportedModel: an architecture, or a feature of it, that is not computed exactly here.
        """
        architecture = (values.get("architectures") or ["none"])[0]
        read = _read(architecture, values)
        heads = _whole(read, "num_attention_heads")
        groups = getattr(read, "num_key_value_heads", None) or heads
        positions = _whole(read, "max_position_embeddings")
        _refuse_rope(getattr(read, "rope_parameters", None) or {}, min(context_length or positions, positions))
        if heads % groups or heads // groups > ROWS:
            raise UnsupportedModel(f"`num_key_value_heads` must divide `num_attention_heads`, into at most {ROWS} each")
        layer_types = getattr(read, "layer_types", None)
        return cls(
            architecture=architecture,
            vocab_size=_whole(read, "vocab_size"),
            num_hidden_layers=_whole(read, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=getattr(read, "head_dim", None) or _whole(read, "hidden_size") // heads,
            max_position_embeddings=positions,
            layer_types=_layer_types(architecture, layer_types),
            windows=_windows(read, layer_types, positions),
            source=values,
        )


def model_class(architecture: str) -> Any:
    """Return transformers' class of a causal language model. Raises UnsupportedModel."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Only names that transformers lists: a configuration does not choose what is looked up.
    if architecture not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UnsupportedModel(f"`{architecture}` is not a language model of the installed transformers")
    found = getattr(transformers, architecture)
    if not found._supports_attention_backend:
        raise UnsupportedModel(f"`{architecture}` computes its attention by itself, which is not invariant")
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from writing about what is reported here by name: its logging and progress bars rest."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _read(architecture: str, values: Mapping[str, Any]) -> Any:
    if values.get("quantization_config"):
        raise UnsupportedModel("`quantization_config`: quantized weights are not served")
    configuration = model_class(architecture).config_class
    if values.get("model_type") != configuration.model_type:
        raise UnsupportedModel(f"`model_type` of `config.json` is not that of a `{architecture}`")
    try:
        with quietly():
            read = configuration.from_dict(dict(values))
    except Exception as error:  # whatever their validation raises
        raise UnsupportedModel(f"`config.json` cannot be read as that of a `{architecture}`") from error
    if getattr(read, "is_encoder_decoder", False):
        raise UnsupportedModel(f"`{architecture}` has an encoder, which is not served")
    return read


def _whole(read: Any, name: str) -> int:
    value = getattr(read, name, None)
    if type(value) is not int or value < 1:
        raise UnsupportedModel(f"`{name}` of `config.json` must be a whole number of at least 1")
    return value


def _layer_types(architecture: str, types: Any) -> tuple[str, ...] | None:
    if types is None:
        return None
    for kind in types:
        if kind not in LAYER_TYPES:
            raise UnsupportedModel(f"`{architecture}` has layers of `{kind}`, which are not served")
    return tuple(types)


def _windows(read: Any, layer_types: Any, positions: int) -> tuple[int, ...]:
    window = getattr(read, "sliding_window", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return ()
    if type(window) is not int or window >= positions:
        return ()
    if window < 1:
        raise UnsupportedModel(f"`sliding_window` of {window} sees nothing")
    return (window,)


def _refuse_rope(parameters: Mapping[str, Any], context_length: int) -> None:
    """Refuse angles that change with the length of the text: keys computed before would have other ones."""
    for value in parameters.values():
        if isinstance(value, Mapping):  # by kind of layer
            _refuse_rope(value, context_length)
    kind = parameters.get("rope_type", "default")
    original = parameters.get("original_max_position_embeddings")
    if kind == "dynamic":
        raise UnsupportedModel("`rope_type` `dynamic` changes with the length of a text and is not served")
    if kind == "longrope" and not (isinstance(original, int) and context_length <= original):
        said = f"set `context_length` to at most {original}" if isinstance(original, int) else "it is not served"
        raise UnsupportedModel(f"`rope_type` `longrope` changes with the length of a text; {said}")
