"""Ten thousand requests of every kind, a tenth of them aborted: memory stays flat, and every block comes back."""

from __future__ import annotations

import gc
import random
from dataclasses import replace

import psutil

from engine.request import GenerationRequest, Pooling, Structure, StructureKind
from tests.support.byte_tokenizer import byte_grammars
from tests.support.engine_core import make_core, make_request
from tests.support.paged_runner import PagedRunner

REQUESTS = 10_000
WARM = 4_000  # until caches and pools of the interpreter have their size
GROWTH = 6 << 20  # bytes, over the 6,000 requests after that
AT_ONCE = 24
YES_OR_NO = Structure(StructureKind.CHOICE, '["yes", "no"]')


def draw_request(rng: random.Random, number: int) -> GenerationRequest:
    """Return a request: prompts share prefixes, keys and salts are of ever new tenants too."""
    stem = rng.randrange(6)
    prompt = [(stem * 7 + index * index) % 250 for index in range(rng.choice([1, 5, 16, 17, 40, 90]))]
    tenant = rng.choice(["a", "b", f"new-{number}"])
    sampling: dict[str, object] = rng.choice(
        [
            {},
            {"temperature": 0.0, "allowed_tokens": (3, 4)},
            {"structure": YES_OR_NO},
            {"repetition_penalty": 1.2, "stop": ("ab",)},
            {"prompt_logprobs": 1},
        ]
    )
    request = make_request(str(number), prompt, rng.randrange(1, 24), salt=tenant.encode(), seed=number, **sampling)
    request = replace(request, fairness_key=tenant, priority=rng.choice([0, 0, 5]))
    if not sampling and rng.random() < 0.3:
        return replace(request, pooling=rng.choice(list(Pooling)))
    if not sampling and rng.random() < 0.3:
        return replace(request, forced=tuple(prompt[: request.sampling.max_tokens]))
    return request


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    rng = random.Random(7)
    core = make_core(
        runner=PagedRunner(96, 258), vocabulary_size=258, context_length=256, max_sequences=12, trial_rows=24
    )
    start = byte_grammars().compile(YES_OR_NO)
    in_flight: set[str] = set()
    aborted, before = 0, 0
    for number in range(REQUESTS):
        while len(in_flight) >= AT_ONCE:
            in_flight -= {one.request_id for one in core.step() if one.delta.finish_reason is not None}
        request = draw_request(rng, number)
        core.add(request, start if request.sampling.structure is not None else None)
        in_flight.add(request.request_id)
        if rng.random() < 0.1:
            victim = rng.choice(sorted(in_flight))
            assert core.abort(victim) is not None
            in_flight.remove(victim)
            aborted += 1
        if number % 100 == 0:
            assert core.check_integrity() == ()
        if number == WARM:
            gc.collect()
            before = psutil.Process().memory_info().rss
    while core.has_work:
        core.step()
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    pool = core.scheduler.pool
    assert core.check_integrity() == ()
    assert (pool.used, pool.free + pool.cached) == (0, pool.total)
    assert core.scheduler._waiting._keys == {}
    assert aborted > 900
    assert core.metrics().preemptions > 0
    assert grown < GROWTH, f"{grown >> 10} KiB"
