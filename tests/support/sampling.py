"""Requests to be sampled, told twice: as the engine plans them, and as the tables that lie on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.plan import Draw, PastTokens
from engine.request import SamplingParams
from kernels.sample import Bias, Cuts, Penalties, SamplingTables


@dataclass(frozen=True, slots=True)
class Sampled:
    params: SamplingParams
    draw: Draw


def random_request(vocabulary: int, generator: torch.Generator) -> Sampled:
    """Return a request that asks for some of everything, or for none of it."""

    def number(least: float, most: float) -> float:
        return least + (most - least) * float(torch.rand((), generator=generator, dtype=torch.float64))

    def asked() -> bool:
        return number(0, 1) < 0.5

    def tokens(most: int) -> list[int]:
        chosen = torch.randint(vocabulary, (1 + int(number(0, most)),), generator=generator)
        return sorted(set(chosen.tolist()))

    past = PastTokens(tokens(20))
    for token in tokens(20) + tokens(20):
        past.add(token)
    params = SamplingParams(
        max_tokens=1,
        seed=int(torch.randint(2**62, (), generator=generator)) * 2 + 1,
        temperature=number(0.1, 2) if number(0, 1) < 0.8 else 0,
        top_k=int(number(1, 40)) if asked() else 0,
        top_p=number(0.01, 0.99) if asked() else 1,
        min_p=number(0, 0.3) if asked() else 0,
        logit_bias=tuple((token, number(-5, 5)) for token in tokens(20)) if asked() else (),
        repetition_penalty=number(0.5, 2) if asked() else 1,
        frequency_penalty=number(-2, 2) if asked() else 0,
        presence_penalty=number(-2, 2) if asked() else 0,
    )
    allowed = torch.rand(vocabulary, generator=generator) < 0.7
    allowed[int(torch.randint(vocabulary, (), generator=generator))] = True
    mask = np.packbits(allowed.numpy(), bitorder="little").tobytes() if asked() else None
    return Sampled(params, Draw(0, past=past, mask=mask))


def tables_of(requests: Sequence[Sampled], vocabulary: int, device: torch.device) -> SamplingTables:
    """Return the tables of requests; every kind of wish is in them, whether or not one of them has it."""

    def column(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([getattr(one.params, name) for one in requests], dtype=dtype, device=device)

    return SamplingTables(
        temperature=column("temperature"),
        seed=column("seed", torch.int64),
        bias=_bias(requests, vocabulary, device),
        penalties=Penalties(
            torch.stack([_history(one, vocabulary) for one in requests]).to(device),
            column("repetition_penalty"),
            column("frequency_penalty"),
            column("presence_penalty"),
        ),
        mask=torch.stack([_mask(one.draw.mask, vocabulary) for one in requests]).to(device),
        cuts=Cuts(column("top_k", torch.int32), column("top_p"), column("min_p")),
    )


def _bias(requests: Sequence[Sampled], vocabulary: int, device: torch.device) -> Bias:
    most = max(1, *(len(one.params.logit_bias) for one in requests))
    ids = torch.full((len(requests), most), vocabulary + 5, dtype=torch.int32)
    values = torch.full((len(requests), most), torch.nan, dtype=torch.float64)
    for row, one in enumerate(requests):
        for place, (token, value) in enumerate(one.params.logit_bias):
            ids[row, place], values[row, place] = token, value
    return Bias(ids.to(device), values.to(device))


def _history(one: Sampled, vocabulary: int) -> Tensor:
    history = torch.zeros(vocabulary, dtype=torch.int32)
    assert one.draw.past is not None
    history[list(one.draw.past.prompt)] = 1
    for token, count in one.draw.past.counts.items():
        history[token] += 2 * count
    return history


def _mask(mask: bytes | None, vocabulary: int) -> Tensor:
    words = -(-vocabulary // 32)
    padded = (mask if mask is not None else b"\xff" * 4 * words).ljust(4 * words, b"\0")
    return torch.from_numpy(np.frombuffer(padded, dtype=np.int32).copy())
