"""Position-wise invariance, as far as scheduling decides it: what is sampled does not depend on how it was scheduled.

The runner's tokens are digests of everything read back through the block table, so any wrong block changes them.
"""

from __future__ import annotations

import pytest

from engine.core import EngineCore
from engine.request import GenerationRequest
from tests.support.engine_core import Output, make_core, make_prompt, make_request, run_all

PROMPTS = [1, 15, 16, 17, 31, 32, 33, 100, 257]
UNBOUNDED = 4096


def alone(length: int, max_tokens: int = 24) -> Output:
    core = make_core(token_budget=UNBOUNDED, chunk_tokens=UNBOUNDED)
    return run_all(core, [make_request("r", make_prompt(length), max_tokens, seed=length)])["r"]


ALONE = {length: alone(length) for length in PROMPTS}


def others(count: int) -> list[GenerationRequest]:
    return [
        make_request(f"other-{index}", make_prompt(1 + 37 * index % 150, 7 * index), 1 + 11 * index % 40, seed=index)
        for index in range(count)
    ]


def bits(output: Output) -> tuple[object, ...]:
    assert output.stats is not None
    return output.tokens, output.logprobs, output.stats.replay_digest


@pytest.mark.parametrize("chunk", [16, 64, 100, UNBOUNDED])
@pytest.mark.parametrize("length", PROMPTS)
def test_chunk_boundaries_change_nothing(length: int, chunk: int) -> None:
    core = make_core(token_budget=UNBOUNDED, chunk_tokens=chunk)
    output = run_all(core, [make_request("r", make_prompt(length), 24, seed=length)])["r"]
    assert bits(output) == bits(ALONE[length])


@pytest.mark.parametrize("count", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("budget", [64, 100, UNBOUNDED])
def test_neighbours_in_the_batch_change_nothing(count: int, budget: int) -> None:
    core = make_core(token_budget=budget, chunk_tokens=budget)
    mine = [make_request(str(length), make_prompt(length), 24, seed=length) for length in PROMPTS]
    beside = others(count)
    outputs = run_all(core, [*beside[: count // 2], *mine, *beside[count // 2 :]])
    assert {length: bits(outputs[str(length)]) for length in PROMPTS} == {
        length: bits(ALONE[length]) for length in PROMPTS
    }


@pytest.mark.parametrize("warm", [15, 16, 17, 32, 96, 112, 128, 144, 240, 256, 257])
def test_a_cache_warm_to_any_block_boundary_changes_nothing(warm: int) -> None:
    core = make_core(chunk_tokens=100)
    run_all(core, [make_request("warm", make_prompt(warm), 1, seed=99)])
    output = run_all(core, [make_request("r", make_prompt(257), 24, seed=257)])["r"]
    assert bits(output) == bits(ALONE[257])
    assert output.stats is not None
    assert output.stats.cached_tokens == min(warm, 256) // 16 * 16


def test_a_cache_warm_over_the_output_changes_nothing() -> None:
    core = make_core()
    request = make_request("r", make_prompt(33), 24, seed=33)
    first = run_all(core, [request])["r"]
    continued = make_request("next", [*make_prompt(33), *first.tokens[:20]], 4, seed=33)
    output = run_all(core, [continued])["next"]
    assert output.stats is not None
    assert output.stats.cached_tokens == 48
    assert output.tokens == first.tokens[20:24]


def test_a_cache_warm_with_other_contents_in_reused_blocks_changes_nothing() -> None:
    core = make_core(blocks=20)
    for index in range(8):  # each evicts what the one before left
        run_all(core, [make_request("noise", make_prompt(270, 31 * index), 3, seed=index)])
        output = run_all(core, [make_request("r", make_prompt(257), 24, seed=257)])["r"]
        assert bits(output) == bits(ALONE[257])


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("chunk", [16, UNBOUNDED])
@pytest.mark.parametrize("length", [1, 16, 33, 100])
def test_preemption_at_every_kth_step_changes_nothing(length: int, chunk: int, every: int) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        if step % every == every - 1 and core.scheduler.running:
            core.scheduler.preempt_youngest()

    core = make_core(token_budget=UNBOUNDED, chunk_tokens=chunk)
    output = run_all(core, [make_request("r", make_prompt(length), 24, seed=length)], before_step=preempt)["r"]
    assert bits(output) == bits(ALONE[length])
    assert output.stats is not None
    assert output.stats.preemptions >= 23 // every


def test_preemption_of_everyone_with_an_evicted_cache_changes_nothing() -> None:
    def preempt(core: EngineCore, step: int) -> None:
        while step % 5 == 4 and core.scheduler.running:
            core.scheduler.preempt_youngest()

    core = make_core(blocks=20, token_budget=64, chunk_tokens=64)
    mine = [make_request(str(length), make_prompt(length), 24, seed=length) for length in PROMPTS]
    outputs = run_all(core, [*others(20), *mine], before_step=preempt)
    assert {length: bits(outputs[str(length)]) for length in PROMPTS} == {
        length: bits(ALONE[length]) for length in PROMPTS
    }


@pytest.mark.parametrize("blocks", [14, 15, 19, 37])
@pytest.mark.parametrize("chunk", [16, UNBOUNDED])
def test_a_pool_too_small_for_all_changes_nothing(blocks: int, chunk: int) -> None:
    core = make_core(blocks, token_budget=UNBOUNDED, chunk_tokens=chunk)
    requests = [make_request(str(length), make_prompt(length), 200, seed=length) for length in range(1, 20, 2)]
    outputs = run_all(core, requests)
    assert core.metrics().preemptions > 0
    for request in requests:
        by_itself = run_all(make_core(), [request])[request.request_id]
        assert bits(outputs[request.request_id]) == bits(by_itself)


def test_salts_share_results_but_never_blocks() -> None:
    core = make_core()
    salts = [b"a", b"b", b"", b"a\x00"]
    outputs = [run_all(core, [make_request("r", make_prompt(100), 24, seed=100, salt=salt)])["r"] for salt in salts]
    assert [bits(output) for output in outputs] == [bits(ALONE[100])] * 4
    assert [output.stats.cached_tokens for output in outputs if output.stats] == [0, 0, 0, 0]
