from __future__ import annotations

from dataclasses import replace

import pytest

from engine.core import EngineCore
from engine.plan import Interrupted, StepPlan, StepResult, never
from engine.request import ContextTooLong, EngineOverloaded, FinishReason, RequestRefused
from tests.support.engine_core import Ticks, make_core, make_prompt, make_request, run_all
from tests.support.paged_runner import PagedRunner


def test_a_request_runs_to_its_length_and_leaves_nothing_behind() -> None:
    core = make_core()
    output = run_all(core, [make_request("r", make_prompt(20), 5)])["r"]
    assert (len(output.tokens), output.finish_reason) == (5, FinishReason.LENGTH)
    assert [entry.token for entry in output.logprobs] == output.tokens
    assert not core.has_work
    assert core.metrics().used_blocks == 0


def test_an_idle_core_steps_to_nothing() -> None:
    assert make_core().step() == []


def test_a_request_ends_at_its_stop_string_in_the_middle_of_others() -> None:
    runner = PagedRunner(64, vocabulary_size=128)  # every token is one ASCII character
    core = make_core(runner=runner)
    free = run_all(core, [make_request("free", make_prompt(9), 40)])["free"]
    stop = free.text[10:13]
    requests = [make_request("stopped", make_prompt(9), 40, stop=(stop,)), make_request("beside", make_prompt(9), 40)]
    outputs = run_all(core, requests)
    assert outputs["stopped"].text == free.text[: free.text.index(stop)]
    assert outputs["stopped"].finish_reason is FinishReason.STOP
    assert outputs["beside"].text == free.text


def free_tokens(**sampling: object) -> list[int]:
    return run_all(make_core(), [make_request("r", make_prompt(9), 12, **sampling)])["r"].tokens


def test_a_stop_token_ends_the_output_as_the_end_of_sequence_does() -> None:
    free = free_tokens()
    stop = free[5]
    assert free.index(stop) == 5
    output = run_all(make_core(), [make_request("r", make_prompt(9), 12, stop_tokens=(stop,))])["r"]
    assert (output.tokens, output.finish_reason) == (free[:6], FinishReason.STOP)
    assert free_tokens(stop_tokens=(stop,), ignore_eos=True) == free[:6]


@pytest.mark.parametrize("least", [1, 5, 6, 7, 9])
def test_before_the_least_length_no_stop_token_is_chosen(least: int) -> None:
    """The runner of this test draws from the ids that are not banned; position by position it knows nothing else."""
    free = free_tokens()
    output = free_tokens(stop_tokens=(free[5],), min_tokens=least)
    assert output[:5] == free[:5]
    if least < 6:
        assert output == free[:6]
    else:
        assert output[5] != free[5]
        assert len(output) >= least


def test_a_request_that_could_say_nothing_is_refused_before_it_is_queued() -> None:
    core = make_core()
    with pytest.raises(RequestRefused, match="min_tokens"):
        core.add(make_request("r", [1], 4, allowed_tokens=(7,), stop_tokens=(7,), min_tokens=1))
    assert not core.has_work


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
def test_an_abort_at_any_step_frees_everything_and_reports_what_was_done(after: int) -> None:
    core = make_core(token_budget=64, chunk_tokens=16)
    core.add(make_request("r", make_prompt(40), 30))
    tokens = [token for _ in range(after) for emission in core.step() for token in emission.delta.tokens]
    emission = core.abort("r")
    assert emission is not None
    assert emission.delta.finish_reason is FinishReason.ABORT
    assert emission.delta.stats is not None
    assert emission.delta.stats.output_tokens == len(tokens)
    assert core.check_integrity() == ()
    assert (core.has_work, core.metrics().used_blocks) == (False, 0)
    assert core.abort("r") is None


def test_an_abort_leaves_the_others_as_they_would_have_been() -> None:
    prompts = {name: make_prompt(30 + 5 * index, index) for index, name in enumerate("abc")}
    alone = {name: run_all(make_core(), [make_request(name, prompts[name], 20)])[name].tokens for name in "ac"}
    core = make_core(token_budget=64)

    def abort_b(core: EngineCore, step: int) -> None:
        if step == 4:
            core.abort("b")

    outputs = run_all(core, [make_request(name, prompts[name], 20) for name in "abc"], before_step=abort_b)
    assert {name: outputs[name].tokens for name in "ac"} == alone


def test_an_id_in_flight_is_refused_and_may_be_used_again_afterwards() -> None:
    core = make_core()
    core.add(make_request("r", [1]))
    with pytest.raises(RequestRefused, match="`request_id`"):
        core.add(make_request("r", [2]))
    core.abort("r")
    core.add(make_request("r", [2]))


def test_a_refused_request_leaves_no_trace() -> None:
    core = make_core(context_length=16, max_sequences=1, waiting_limit=0)
    with pytest.raises(ContextTooLong):
        core.add(make_request("long", make_prompt(16)))
    core.add(make_request("fits", make_prompt(15)))
    with pytest.raises(EngineOverloaded):
        core.add(make_request("more", [1]))
    assert core.abort("long") is None
    assert core.abort("more") is None


def test_stats_tell_queue_cache_and_preemption() -> None:
    clock = Ticks()
    core = make_core(clock=clock, max_sequences=1, token_budget=64)

    def tick(core: EngineCore, step: int) -> None:
        clock.now += 1.0
        if step == 4:
            core.scheduler.preempt_youngest()

    requests = [make_request("first", make_prompt(33), 6), make_request("second", make_prompt(33), 2)]
    outputs = run_all(core, requests, before_step=tick)
    first, second = outputs["first"].stats, outputs["second"].stats
    assert first is not None
    assert second is not None
    assert (first.queued_s, first.first_token_s, first.total_s) == (1.0, 1.0, 6.0)
    assert (first.preemptions, first.cached_tokens) == (1, 0)
    assert (second.queued_s, second.cached_tokens, second.prompt_tokens) == (7.0, 32, 33)


def test_what_the_runner_raises_comes_through() -> None:
    class BrokenRunner(PagedRunner):
        def run(self, plan: StepPlan, interrupted: Interrupted = never) -> StepResult:
            raise FloatingPointError

    core = make_core(runner=BrokenRunner(8))
    core.add(make_request("r", [1], 1))
    with pytest.raises(FloatingPointError):
        core.step()


def test_an_adapter_that_is_not_there_is_refused_before_it_is_queued() -> None:
    core = make_core(adapters=("known",))
    with pytest.raises(RequestRefused, match="`adapter`") as refused:
        core.add(replace(make_request("r", make_prompt(9)), adapter="unknown"))
    assert refused.value.param == "adapter"
    assert not core.has_work
    assert "unknown" not in str(refused.value)


def test_what_was_cached_with_an_adapter_is_found_with_it_alone_and_forgotten_by_its_salt() -> None:
    core = make_core(adapters=("x", "y"))
    request = make_request("r", make_prompt(40))

    def cached(adapter: str | None) -> tuple[int, list[int]]:
        output = run_all(core, [replace(request, adapter=adapter)])["r"]
        assert output.stats is not None
        return output.stats.cached_tokens, output.tokens

    cold = [cached(adapter) for adapter in (None, "x", "y")]
    assert [hits for hits, _ in cold] == [0, 0, 0]
    assert len({tuple(tokens) for _, tokens in cold}) == 3
    warm = [cached(adapter) for adapter in (None, "x", "y")]
    assert warm == [(32, tokens) for _, tokens in cold]
    core.reset_cache(request.cache_salt)
    assert [cached(adapter) for adapter in (None, "x", "y")] == cold
