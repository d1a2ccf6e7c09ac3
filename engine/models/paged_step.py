"""Our paged attention as a borrowed model asks for it: registered with transformers under `NAME`, told of the step it
is in by a keyword argument that every layer passes on.

What a layer asks for and this does not know is refused by name; nothing is ignored that could change a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.config import UnsupportedModel
from engine.models.arithmetic import KVCache
from engine.models.cpu_arithmetic import StepInputs
from engine.models.products import Products
from engine.models.rows import padded
from kernels.attention_plan import AttentionPlan
from kernels.paged_attention import Segment, paged_attention, soft_capped
from kernels.rope_store import store_kv

NAME = "probity"
KEYWORD = "probity_step"


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One step on its way through the layers."""

    inputs: StepInputs
    caches: list[KVCache]
    segment: Segment
    products: Products
    longest: int  # positions of the model; a window of as many cuts nothing off
    asked: dict[int, LayerAttention]  # what each layer asked for, by its index; filled on the way

    def plan(self, window: int | None) -> AttentionPlan:
        if window is None or window >= self.longest:
            return self.inputs.plans[None]
        if window not in self.inputs.plans:
            raise UnsupportedModel(f"a layer asks for a window of {window} keys that `config.json` does not name")
        return self.inputs.plans[window]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What a layer's attention is beside softmax(scale · q·kᵀ)·v."""

    window: int | None
    softcap: float | None
    sinks: bool


# What says nothing about the values, or nothing beyond what the step says.
_KNOWN = frozenset(
    {"position_ids", "cache_position", "use_cache", "return_dict", "past_key_values", "position_embeddings"}
)


def attention(
    module: Any,
    query: Tensor,  # [1, H, T', D]  the step's T tokens and their padding
    key: Tensor,  # [1, G, T', D]
    value: Tensor,  # [1, G, T', D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [H]
    probity_step: PagedStep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # [1, T', H, D]
    """Store the step's keys and values in the layer's cache, and return its attention."""
    if probity_step is None:
        raise UnsupportedModel(f"`{type(module).__name__}` does not hand the step to its attention")
    _refuse(module, attention_mask, scaling, dropout, others)
    probity_step.inputs.give_way()
    step, layer = probity_step, module.layer_idx
    with step.products.ours():
        tokens = len(step.inputs.tokens)
        cache = step.caches[layer]
        heads, keys, values = (part[0].transpose(0, 1)[:tokens].contiguous() for part in (query, key, value))
        if keys.shape != values.shape or keys.shape[1:] != cache.key.shape[2:]:
            raise UnsupportedModel(f"`{type(module).__name__}` has heads of more than one size")
        store_kv(keys, values, cache.key, cache.value, step.inputs.slots)
        assert scaling is not None  # `_refuse` has seen to it
        segment = step.segment if softcap is None else soft_capped(softcap)
        attended = paged_attention(heads, cache.key, cache.value, step.plan(sliding_window), scaling, segment, s_aux)
        step.asked[layer] = LayerAttention(sliding_window, softcap, s_aux is not None)
        return padded(attended)[None], None


def _refuse(module: Any, mask: Tensor | None, scaling: float | None, dropout: float, others: dict[str, Any]) -> None:
    name = type(module).__name__
    if mask is not None:
        raise UnsupportedModel(f"`{name}` brings a mask of its own, which is not served")
    if scaling is None or dropout:
        raise UnsupportedModel(f"`{name}` gives no `scaling`, or asks for dropout")
    if not getattr(module, "is_causal", True) or others.pop("is_causal", None) is False:
        raise UnsupportedModel(f"`{name}` sees what comes after a token, which is not served")
    for argument, given in others.items():
        if argument not in _KNOWN and given is not None and given is not False:
            raise UnsupportedModel(f"`{name}` asks for attention with `{argument}`, which is not served")
