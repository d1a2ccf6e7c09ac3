"""What is looked at in a step on a device: tokens that are drawn, and tokens of prompts whose log-probability is asked.

The kernels of kernels/sample.py and kernels/logprobs.py are compiled anew for every set of wishes (a bias, penalties, a
mask, a cut; so many alternatives), and a sum may go another way in each. So looks go by their kind, each by the kernels
that it would have alone: what a neighbour wishes for changes no bit of it. The order and the rule for ties are those of
engine/sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.plan import Draw, RowPlan, Score
from engine.request import SamplingParams, TokenLogprob
from engine.transfer import Outbox, aligned
from kernels.logprobs import logprobs_triton
from kernels.sample import WORD, Bias, Cuts, Penalties, SamplingTables, sample_triton

TOGETHER = 1024  # looks whose logits are in memory at once
TIERS = (0, 5, 20)  # alternatives that a kernel is compiled for; the last is the most that may be asked for
LEAST_BIASES = 16  # and 4 times as many, and so on

Logits = Callable[[Tensor], Tensor]  # of hidden states [R, H], [R, V] float32


class Kind(NamedTuple):
    """What a look asks of the kernels."""

    tier: int  # alternatives
    drawn: bool
    biases: int = 0  # places for them; 0: none is asked for
    penalised: bool = False
    masked: bool = False
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    at: int  # after which of the step's tokens
    row: RowPlan
    asked: Draw | Score

    @property
    def alternatives(self) -> int:
        sampling = self.row.sampling
        if isinstance(self.asked, Score):
            return sampling.prompt_logprobs or 0
        return sampling.top_logprobs if sampling.logprobs else 0

    @property
    def kind(self) -> Kind:
        tier = next(tier for tier in TIERS if tier >= self.alternatives)
        if isinstance(self.asked, Score):
            return Kind(tier, drawn=False)
        wishes, draw = self.row.sampling, self.asked
        return Kind(
            tier,
            drawn=True,
            biases=_places(len(wishes.logit_bias)),
            penalised=wishes.looks_back,
            masked=bool(wishes.allowed_tokens or draw.banned) or draw.mask is not None,
            cut=wishes.temperature > 0 and (wishes.top_k > 0 or wishes.top_p < 1 or wishes.min_p > 0),
        )


def _places(biases: int) -> int:
    places = LEAST_BIASES if biases else 0
    while places < biases:
        places *= 4
    return places


@dataclass(frozen=True, slots=True)
class _Group:
    """Looks of one kind that stand together."""

    start: int
    stop: int
    tokens: Callable[[Sequence[Tensor], Tensor], Tensor]  # from what was sent, and their logits: theirs


class Looks:
    """The looks of one step: packed, carried out, read, in this order."""

    def __init__(self, looks: Sequence[Look], vocabulary: int, outbox: Outbox, together: int = TOGETHER) -> None:
        self._vocabulary = vocabulary
        self._together = together
        kinds = [look.kind for look in looks]
        order = sorted(range(len(looks)), key=kinds.__getitem__)
        self._place = np.argsort(np.array(order, dtype=np.int64))  # of each look in that order
        self._looks = [looks[index] for index in order]
        self._kinds = [kinds[index] for index in order]
        self._at = outbox.add(np.array([look.at for look in self._looks], dtype=np.int64))
        self._chunks = [self._pack(start, outbox) for start in range(0, len(looks), together)]

    def _pack(self, start: int, outbox: Outbox) -> list[_Group]:
        groups = []
        for kind, same in groupby(self._kinds[start : start + self._together]):
            stop = start + len(list(same))
            pack = _pack_draws if kind.drawn else _pack_scores
            groups.append(_Group(start, stop, pack(self._looks[start:stop], kind, self._vocabulary, outbox)))
            start = stop
        return groups

    def carry_out(self, sent: Sequence[Tensor], hidden: Tensor, logits_of: Logits) -> list[Tensor]:
        """Return what `read` reads, from the hidden states [T, H] of the step's tokens."""
        results = []
        for groups in self._chunks:
            first = groups[0].start
            logits = logits_of(hidden.index_select(0, sent[self._at][first : groups[-1].stop]))
            of = {group: aligned(logits[group.start - first : group.stop - first]) for group in groups}
            tokens = torch.cat([group.tokens(sent, of[group]) for group in groups])
            results.append(tokens)
            for (start, stop), alternatives in self._tiers(groups):
                part = slice(start - first, stop - first)
                found = logprobs_triton(aligned(logits[part]), aligned(tokens[part]), alternatives)
                results += [found.selected, found.top_ids, found.top]
        return results

    def _tiers(self, groups: Sequence[_Group]) -> Iterator[tuple[tuple[int, int], int]]:
        """Yield the looks of each tier, which stand together, from where to where, and its alternatives."""
        for tier, members in groupby(groups, key=lambda group: self._kinds[group.start].tier):
            found = list(members)
            yield (found[0].start, found[-1].stop), min(tier, self._vocabulary)

    def read(self, results: Iterator[Tensor]) -> list[TokenLogprob]:
        """Return what was found, in the order in which the looks were given, from the results on the host."""
        found: list[TokenLogprob] = []
        for groups in self._chunks:
            (tokens,) = islice(results, 1)
            drawn = iter(tokens.tolist())
            for (start, stop), _ in self._tiers(groups):
                selected, ids, values = (part.tolist() for part in islice(results, 3))
                for look, logprob, top, theirs in zip(self._looks[start:stop], selected, ids, values, strict=True):
                    best = tuple(zip(top, theirs, strict=True))[: look.alternatives]
                    found.append(TokenLogprob(next(drawn), logprob, best))
        return [found[place] for place in self._place]


def _pack_scores(
    looks: Sequence[Look], kind: Kind, vocabulary: int, outbox: Outbox
) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    wanted = [look.asked.token for look in looks if isinstance(look.asked, Score)]
    at = outbox.add(np.array(wanted, dtype=np.int64))
    return lambda sent, logits: sent[at]


def _pack_draws(
    looks: Sequence[Look], kind: Kind, vocabulary: int, outbox: Outbox
) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    wishes = [look.row.sampling for look in looks]
    draws = [look.asked for look in looks if isinstance(look.asked, Draw)]
    request = outbox.add(np.arange(len(looks), dtype=np.int32))
    position = outbox.add(
        np.array([look.row.position(draw) for look, draw in zip(looks, draws, strict=True)], dtype=np.int64)
    )
    temperature = outbox.add(_column(wishes, "temperature"))
    seed = outbox.add(np.array([wish.seed for wish in wishes], dtype=np.int64))
    bias = _pack_bias(wishes, kind.biases, vocabulary, outbox) if kind.biases else None
    penalties = _pack_penalties(wishes, draws, vocabulary, outbox) if kind.penalised else None
    mask = (
        outbox.add(np.stack([_mask(*pair, vocabulary) for pair in zip(wishes, draws, strict=True)]))
        if kind.masked
        else None
    )
    cuts = _pack_cuts(wishes, outbox) if kind.cut else None

    def draw(sent: Sequence[Tensor], logits: Tensor) -> Tensor:
        tables = SamplingTables(
            sent[temperature],
            sent[seed],
            None if bias is None else bias(sent),
            None if penalties is None else penalties(sent),
            None if mask is None else sent[mask],
            None if cuts is None else cuts(sent),
        )
        return sample_triton(logits, sent[request], sent[position], tables)

    return draw


def _column(wishes: Sequence[SamplingParams], name: str) -> npt.NDArray[np.float64]:
    return np.array([getattr(wish, name) for wish in wishes], dtype=np.float64)


def _pack_bias(
    wishes: Sequence[SamplingParams], places: int, vocabulary: int, outbox: Outbox
) -> Callable[[Sequence[Tensor]], Bias]:
    ids = np.full((len(wishes), places), vocabulary, dtype=np.int32)
    values = np.zeros((len(wishes), places))
    for row, wish in enumerate(wishes):
        for place, (token, value) in enumerate(wish.logit_bias):
            ids[row, place], values[row, place] = token, value
    of_ids, of_values = outbox.add(ids), outbox.add(values)
    return lambda sent: Bias(sent[of_ids], sent[of_values])


def _pack_cuts(wishes: Sequence[SamplingParams], outbox: Outbox) -> Callable[[Sequence[Tensor]], Cuts]:
    top_k = outbox.add(np.array([wish.top_k for wish in wishes], dtype=np.int32))
    top_p, min_p = outbox.add(_column(wishes, "top_p")), outbox.add(_column(wishes, "min_p"))
    return lambda sent: Cuts(sent[top_k], sent[top_p], sent[min_p])


def _pack_penalties(
    wishes: Sequence[SamplingParams], draws: Sequence[Draw], vocabulary: int, outbox: Outbox
) -> Callable[[Sequence[Tensor]], Penalties]:
    """What stood before travels as the tokens that did; on the device they are put among the others."""
    prompts, outputs, counts = [], [], []
    for row, draw in enumerate(draws):
        assert draw.past is not None  # whoever plans the row brings it
        seen, times = draw.past.prompt, draw.past.counts
        prompts.append(np.fromiter(seen, np.int64, len(seen)) + row * vocabulary)
        outputs.append(np.fromiter(times, np.int64, len(times)) + row * vocabulary)
        counts.append(2 * np.fromiter(times.values(), np.int32, len(times)))
    in_prompt, in_output, twice = (outbox.add(np.concatenate(parts)) for parts in (prompts, outputs, counts))
    columns = [
        outbox.add(_column(wishes, name)) for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    ]

    def arrived(sent: Sequence[Tensor]) -> Penalties:
        history = torch.zeros(len(wishes) * vocabulary, dtype=torch.int32, device=sent[twice].device)
        history.index_fill_(0, sent[in_prompt], 1)
        history.index_copy_(0, sent[in_output], history[sent[in_output]] + sent[twice])  # no place twice
        return Penalties(history.view(len(wishes), vocabulary), *(sent[column] for column in columns))

    return arrived


def _mask(wish: SamplingParams, draw: Draw, vocabulary: int) -> npt.NDArray[np.int32]:
    """Return the words of a mask: what the grammar allows, of what is allowed, without what is banned."""
    words = -(-vocabulary // WORD)
    bits = np.full(4 * words, 0xFF, dtype=np.uint8)
    if draw.mask is not None:
        given = np.frombuffer(draw.mask, dtype=np.uint8)[: bits.size]
        bits[: given.size], bits[given.size :] = given, 0
    if wish.allowed_tokens:
        bits &= _bits(wish.allowed_tokens, bits.size)
    if draw.banned:
        bits &= ~_bits(draw.banned, bits.size)
    return bits.view("<i4").astype(np.int32)


def _bits(tokens: Sequence[int], size: int) -> npt.NDArray[np.uint8]:
    ids = np.array(tokens, dtype=np.int64)
    bits = np.zeros(size, dtype=np.uint8)
    np.bitwise_or.at(bits, ids // 8, (1 << (ids % 8)).astype(np.uint8))
    return bits
