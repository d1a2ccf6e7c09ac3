"""A family through transformers' own modelling code: its layers and their order are borrowed, its arithmetic is ours.

    tokens ▶ [ their layers: products → the engine's · attention → paged_step.py · experts → experts.py
               rotary positions → rope_table.py ] ▶ hidden ▶ their head ▶ logits

Slower than decoder.py, and as invariant. A pass is padded to whole vectors (rows.py) and ends at the first thing that
is not known to keep rows apart (products.py, operations.py); probe.py runs it before it is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import EngineStartError
from engine.models import experts, paged_step
from engine.models.arithmetic import KVCache
from engine.models.borrowed_config import BorrowedConfig, model_class, quietly
from engine.models.cpu_arithmetic import StepInputs
from engine.models.operations import Operations
from engine.models.paged_step import LayerAttention, PagedStep
from engine.models.products import Products
from engine.models.rope_table import RopeTable
from engine.models.rows import padded
from kernels.linear import Linear
from kernels.paged_attention import Segment


class WeightsDoNotFit(EngineStartError):
    """The weights of a checkpoint are not those of its architecture; the message names one."""


class _Slice:
    """A weight as transformers has one of a file: by indexing. It is given out once, and not held beside what is made
    of it."""

    def __init__(self, tensor: Tensor) -> None:
        self._held = [tensor]

    def __getitem__(self, _: object) -> Tensor:
        return self._held.pop()


def build(config: BorrowedConfig, tensors: dict[str, Tensor]) -> Any:
    """Return transformers' model, as it stands, with `tensors` by their names in the checkpoint for its weights.

    They are taken out of `tensors`: nothing of a model is read from a file here, and nothing of it is held twice.

    Raises:
        WeightsDoNotFit: a weight is missing, is one too many, or has another shape.
    """
    source = model_class(config.architecture)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    slices = {name: _Slice(tensors.pop(name)) for name in shapes}
    with quietly():
        read = source.config_class.from_dict(dict(config.source))
        try:
            module, found = source.from_pretrained(
                None,
                config=read,
                state_dict=slices,
                dtype=torch.bfloat16,
                output_loading_info=True,
                attn_implementation="eager",
                experts_implementation="eager",
            )
        except RuntimeError as error:  # raised where several weights of a checkpoint become one
            raise WeightsDoNotFit(_amiss(config, shapes)) from error
    for kind, said in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "is not one of this architecture"),
        ("mismatched_keys", "has another shape than the architecture"),
    ):
        names = sorted(name if isinstance(name, str) else name[0] for name in found[kind])
        if names:
            raise WeightsDoNotFit(f"the weight `{names[0]}` {said} ({len(names)} in all)")
    return module.eval().requires_grad_(False)


def _amiss(config: BorrowedConfig, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what is wrong with weights that could not be put together, by their names in the checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    source = model_class(config.architecture)
    with torch.device("meta"):
        module = source(source.config_class.from_dict(dict(config.source)))
    expected = revert_weight_conversion(module, module.state_dict())
    shared = module.all_tied_weights_keys  # with another weight, so that they need not be stored
    for name in sorted(expected.keys() - shapes.keys() - shared.keys()):
        return f"the weight `{name}` is missing"
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] != tuple(expected[name].shape):
            return f"the weight `{name}` has shape {list(shapes[name])}, not {list(expected[name].shape)}"
    return f"the weights cannot be put together as those of a `{config.architecture}`"


class _Given(nn.Module):
    """In the place of all layers: hidden states that are known already. What is left of the model is its head."""

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class BorrowedModel:
    """`model.Model` on a module of transformers, which is changed for good."""

    def __init__(self, config: BorrowedConfig, module: Any, linear: Linear, segment: Segment, positions: int) -> None:
        """Take a built module. `positions` is the longest context that will be asked for."""
        self.config = config
        self._segment = segment
        self._products = Products(linear)
        _adopt(module, positions)
        self._layers = getattr(module, module.base_model_prefix)
        setattr(module, module.base_model_prefix, _Given())
        self._head = module
        self.asked: dict[int, LayerAttention] = {}  # by layer, of the last pass

    def hidden(self, inputs: StepInputs, caches: list[KVCache]) -> Tensor:
        """Return the hidden states, [T, H]; keys and values are stored on the way."""
        self.asked = {}
        longest = self.config.max_position_embeddings
        step = PagedStep(inputs, caches, self._segment, self._products, longest, self.asked)
        with self._products:
            output = self._layers(
                input_ids=padded(inputs.tokens)[None],
                position_ids=padded(inputs.positions)[None],
                use_cache=False,
                **{paged_step.KEYWORD: step},
            )
        states: Tensor = output.last_hidden_state[0, : len(inputs.tokens)]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] float32 of hidden states [R, H]."""
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        with self._products:
            output = self._head(inputs_embeds=padded(hidden)[None], use_cache=False)
        logits: Tensor = output.logits[0, : len(hidden)]
        return logits.float()

    def watched(self) -> AbstractContextManager[Any]:
        """Return what ends a pass, run within it, at the first operation that is not known to keep rows apart."""
        return Operations(self._products)


def _adopt(module: Any, positions: int) -> None:
    """Make attention, experts and rotary positions of `module` the engine's."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(paged_step.NAME, paged_step.attention)
    ExpertsInterface.register(experts.NAME, experts.experts)
    module.set_attn_implementation(paged_step.NAME)
    module.set_experts_implementation(experts.NAME)
    experts.lay_out(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(parent, name, RopeTable(child, positions, module.dtype))
