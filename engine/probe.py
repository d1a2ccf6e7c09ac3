"""A borrowed model, run before it is served: is it exact, and does it keep every row's bits among any neighbours?

    exact      its hidden states, by our attention and experts, are close to those of transformers' own, and every layer
               asked our attention for what `config.json` says
    invariant  a text gives the same bits alone, in chunks, token by token, and beside others

It is random tokens, a few hundred at most: enough to leave a short sliding window, not a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.config import UnsupportedModel
from engine.model_runner import InvarianceUnavailable, ModelRunner
from engine.models.borrowed import BorrowedModel
from engine.plan import BLOCK_SIZE, Draw, Pool, RowPlan, StepPlan
from engine.request import Pooling, SamplingParams

MOST = 320  # tokens of the text
LEAST = 72
LOSS = 0.1  # of a hidden state's own size: what two orders of summation in bfloat16 may differ by
_BLOCKS = 3 * (-(-MOST // BLOCK_SIZE))
_GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=True, top_logprobs=20)


def probe_tokens(vocabulary: int, windows: Sequence[int], positions: int) -> list[int]:
    """Return the text: beyond the longest window where that is short."""
    length = min(positions - 1, max([LEAST, *(window + 24 for window in windows if window + 24 <= MOST)]))
    drawn = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    return list(drawn.tolist())


@torch.inference_mode()
def reference(module: Any, tokens: Sequence[int]) -> Tensor:
    """Return the hidden states [T, H] of a module as transformers computes them."""
    states: Tensor = getattr(module, module.base_model_prefix)(
        input_ids=torch.tensor([list(tokens)]), use_cache=False
    ).last_hidden_state[0]
    return states


def verify(model: BorrowedModel, tokens: Sequence[int], expected: Tensor) -> None:
    """Refuse a model that is not exact or not invariant here. `expected` is what `reference` gave before.

    Raises:
        UnsupportedModel: it is not exact, or does what is not known to be invariant.
        InvarianceUnavailable: its bits depend on its neighbours.
    """
    runner = ModelRunner(model, _BLOCKS)
    _verify_exact(model, runner, tokens, expected)
    name = model.config.architecture
    alone = _run(runner, [_text(tokens, 0)])
    for beside, splits in ((0, (1, 17)), (1, ()), (2, (len(tokens) - 2, len(tokens) - 1)), (1, (33,))):
        if _among(runner, tokens, beside, splits) != alone:
            raise InvarianceUnavailable(f"`{name}` gives a row other bits among neighbours; it could not be replayed")


@torch.inference_mode()
def _verify_exact(model: BorrowedModel, runner: ModelRunner, tokens: Sequence[int], expected: Tensor) -> None:
    name, config = model.config.architecture, model.config
    inputs = runner.inputs([_text(tokens, 0)])
    with model.watched():
        states = model.hidden(inputs, runner.caches)
        model.logits(states[-1:])
    if sorted(model.asked) != list(range(config.num_hidden_layers)):
        raise UnsupportedModel(f"`{name}` has layers that are not attention, which are not served")
    for layer, kind in enumerate(config.layer_types or ()):
        slides = model.asked[layer].window is not None
        if slides != (kind == "sliding_attention"):
            raise UnsupportedModel(f"`{name}` does not tell its attention of the window that `layer_types` names")
    apart, size = ((part.float().pow(2).mean(dim=-1).sqrt()) for part in (states - expected, expected))
    if not float((apart / size).median()) < LOSS:  # most tokens: a few may have met other experts
        raise UnsupportedModel(f"`{name}` does not give with our attention what it gives with its own")


def _among(runner: ModelRunner, tokens: Sequence[int], beside: int, splits: tuple[int, ...]) -> object:
    """Return what the text's last token showed, the text cut at `splits`, with `beside` other texts around it."""
    shown: object = None
    for index, (start, end) in enumerate(pairwise((0, *splits, len(tokens)))):
        before = [_other(1, 13 + 20 * index)] if beside > 0 else []
        after = [_other(2, 1)] if beside > 1 else []
        shown = _run(runner, [*before, _text(tokens[:end], start), *after], len(before))
    return shown


def _run(runner: ModelRunner, rows: Sequence[RowPlan], index: int = 0) -> object:
    result = runner.run(StepPlan(tuple(rows)))
    return result.sampled[index], result.readings[index]


def _text(tokens: Sequence[int], start: int) -> RowPlan:
    rest = tuple(tokens[start:])
    return RowPlan(rest, start, _blocks(0), _GREEDY, (Draw(len(rest) - 1),), (), Pool(Pooling.LAST, None))


def _other(third: int, length: int) -> RowPlan:
    return RowPlan(tuple(index % 3 for index in range(length)), 0, _blocks(third), _GREEDY, ())


def _blocks(third: int) -> tuple[int, ...]:
    return tuple(range(third * _BLOCKS // 3, (third + 1) * _BLOCKS // 3))
