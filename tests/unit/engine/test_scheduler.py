from __future__ import annotations

from dataclasses import replace

import pytest

from engine.blocks import BlockPool, Defect
from engine.plan import StepPlan, StepResult
from engine.request import EngineOverloaded, GenerationRequest, RequestRefused, TokenLogprob
from engine.scheduler import MOST_PAUSES, Scheduler, StepMismatch
from engine.sequence import Sequence, SequenceStatus
from tests.support.engine_core import make_limits, make_prompt, make_request


def make_scheduler(blocks: int = 64, **limits: int) -> Scheduler:
    return Scheduler(make_limits(**limits), BlockPool(blocks))


def request(number: int, length: int, max_tokens: int = 50, salt: bytes = b"salt") -> GenerationRequest:
    return make_request(str(number), make_prompt(length, start=number * 1000), max_tokens, salt=salt)


def answer(plan: StepPlan, token: int = 7) -> StepResult:
    return StepResult(tuple(tuple(TokenLogprob(token, -1.0) for _ in row.draws) for row in plan.rows))


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(answer(plan))
    assert scheduler.check_integrity() == ()
    return plan


def shape(plan: StepPlan) -> list[tuple[int, int, bool]]:
    return [(row.start, len(row.tokens), bool(row.draws)) for row in plan.rows]


def test_nothing_in_flight_plans_nothing() -> None:
    assert make_scheduler().plan() is None


def test_a_long_prompt_is_prefilled_in_chunks_and_sampled_once_at_its_end() -> None:
    scheduler = make_scheduler(chunk_tokens=16)
    scheduler.add(request(0, 40))
    shapes = [shape(step(scheduler)) for _ in range(5)]
    assert shapes == [[(0, 16, False)], [(16, 16, False)], [(32, 8, True)], [(40, 1, True)], [(41, 1, True)]]


def test_decodes_go_on_beside_a_prefill_that_takes_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(token_budget=20, max_sequences=4)
    scheduler.add(request(0, 3))
    step(scheduler)
    scheduler.add(request(1, 50))
    assert shape(step(scheduler)) == [(3, 1, True), (0, 19, False)]
    assert shape(step(scheduler)) == [(4, 1, True), (19, 19, False)]
    assert shape(step(scheduler)) == [(5, 1, True), (38, 12, True)]


def test_a_prefill_older_than_the_decodes_cannot_starve_them() -> None:
    scheduler = make_scheduler(token_budget=4, max_sequences=4, chunk_tokens=2)
    scheduler.add(request(0, 30))
    scheduler.add(request(1, 1))
    scheduler.add(request(2, 1))
    step(scheduler)
    for _ in range(3):
        plan = step(scheduler)
        assert plan.token_count <= 4
        assert [len(row.tokens) for row in plan.rows] == [2, 1, 1]


def test_no_step_exceeds_budget_or_sequences() -> None:
    scheduler = make_scheduler(token_budget=24, max_sequences=5)
    for number in range(20):
        scheduler.add(request(number, 1 + 13 * number % 60))
    for _ in range(30):
        plan = step(scheduler)
        assert plan.token_count <= 24
        assert len(plan.rows) <= 5


def test_requests_are_admitted_in_order_of_arrival_even_if_a_younger_one_would_fit() -> None:
    scheduler = make_scheduler(blocks=4)
    scheduler.add(request(0, 20, max_tokens=20))
    step(scheduler)
    large = scheduler.add(request(1, 50, max_tokens=5))
    small = scheduler.add(request(2, 1, max_tokens=5))
    plan = step(scheduler)
    assert len(plan.rows) == 1
    assert large.status is small.status is SequenceStatus.WAITING


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back_with_its_tokens() -> None:
    scheduler = make_scheduler(blocks=4)
    old, young = scheduler.add(request(0, 16, 40)), scheduler.add(request(1, 17, 40))
    step(scheduler)
    assert (len(old.blocks), len(young.blocks)) == (1, 2)
    for _ in range(16):
        step(scheduler)
    assert old.status is SequenceStatus.RUNNING
    assert young.status is SequenceStatus.WAITING
    assert young.preemptions == 1
    emitted = young.tokens[17:]
    scheduler.finish(old)
    plan = step(scheduler)
    row = plan.rows[0]
    assert row.tokens == tuple([*make_prompt(17, 1000), *emitted][row.start :])
    assert young.tokens[17:-1] == emitted


def test_a_sequence_alone_in_a_full_pool_is_never_preempted() -> None:
    scheduler = make_scheduler(blocks=4)
    sequence = scheduler.add(request(0, 60, max_tokens=5))
    for _ in range(5):
        step(scheduler)
    assert (len(sequence.tokens), sequence.preemptions) == (65, 0)


def test_the_last_prompt_token_is_always_computed_and_only_full_blocks_are_reused() -> None:
    scheduler = make_scheduler()
    for length, expected in ((48, 0), (48, 32), (49, 48), (47, 32), (16, 0), (17, 16)):
        sequence = scheduler.add(make_request("x", make_prompt(length)))
        plan = step(scheduler)
        assert sequence.cached_tokens == plan.rows[0].start == expected
        scheduler.finish(sequence)


def test_generated_blocks_are_reused_by_the_next_turn_of_a_conversation() -> None:
    scheduler = make_scheduler()
    first = scheduler.add(request(0, 10))
    for _ in range(23):  # the last token sampled is not computed: 32 slots are filled
        step(scheduler)
    scheduler.finish(first)
    second = scheduler.add(make_request("next", [*first.tokens, 1, 2, 3]))
    step(scheduler)
    assert second.cached_tokens == 32


def test_another_salt_finds_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 64, salt=b"a"))
    step(scheduler)
    other = scheduler.add(request(0, 64, salt=b"b"))
    step(scheduler)
    assert other.cached_tokens == 0


def test_blocks_shared_by_running_sequences_are_held_by_both() -> None:
    scheduler = make_scheduler()
    one = scheduler.add(request(0, 40))
    step(scheduler)
    two = scheduler.add(request(0, 40))
    step(scheduler)
    assert one.blocks[:2] == two.blocks[:2]
    assert one.blocks[2] != two.blocks[2]
    assert scheduler.pool.used == 4
    scheduler.finish(one)
    assert scheduler.check_integrity() == ()
    assert scheduler.pool.used == 3


def test_a_block_is_reused_only_after_the_step_that_fills_it_and_its_sharer_waits_for_that() -> None:
    scheduler = make_scheduler(token_budget=64, chunk_tokens=32)
    scheduler.add(request(0, 70))
    second = scheduler.add(request(0, 70))
    assert shape(step(scheduler)) == [(0, 32, False)]
    assert shape(step(scheduler)) == [(32, 32, False)]
    assert shape(step(scheduler)) == [(64, 6, True), (64, 6, True)]
    assert second.cached_tokens == 64


def test_nobody_waits_for_a_block_of_another_salt_or_of_no_use() -> None:
    for other in (request(0, 40, salt=b"other"), request(1, 40), request(0, 16), request(0, 9)):
        scheduler = make_scheduler()
        scheduler.add(request(0, 40))
        scheduler.add(other)
        assert len(step(scheduler).rows) == 2


def test_finishing_anywhere_gives_every_block_back() -> None:
    scheduler = make_scheduler(max_sequences=1, token_budget=16)
    running, waiting = scheduler.add(request(0, 40)), scheduler.add(request(1, 40))
    step(scheduler)
    for sequence in (waiting, running, running):
        scheduler.finish(sequence)
        assert scheduler.check_integrity() == ()
    assert (scheduler.pool.used, scheduler.running, scheduler.waiting) == (0, 0, 0)


def test_the_queue_is_bounded() -> None:
    scheduler = make_scheduler(max_sequences=2, waiting_limit=3)
    for number in range(5):
        scheduler.add(request(number, 5))
    with pytest.raises(EngineOverloaded):
        scheduler.add(request(5, 5))
    step(scheduler)
    with pytest.raises(EngineOverloaded):
        scheduler.add(request(5, 5))


def test_an_impossible_request_is_refused_before_it_is_queued() -> None:
    scheduler = make_scheduler(blocks=2)
    with pytest.raises(RequestRefused):
        scheduler.add(request(0, 30, max_tokens=4))
    assert scheduler.waiting == 0


def test_a_result_that_does_not_answer_the_plan_is_our_error() -> None:
    token = TokenLogprob(1, -1.0)
    for sampled in ((), ((),), ((token, token),), ((token,), (token,))):
        scheduler = make_scheduler()
        scheduler.add(request(0, 5))
        scheduler.plan()
        with pytest.raises(StepMismatch):
            scheduler.commit(StepResult(sampled))


def test_planning_twice_without_a_commit_is_our_error_unless_the_plan_is_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    scheduler.plan()
    with pytest.raises(StepMismatch):
        scheduler.plan()
    scheduler.drop_plan()
    assert shape(step(scheduler)) == [(0, 5, True)]


def flooded(sequences: int = 4, **limits: int) -> Scheduler:
    """A scheduler whose places are all one key's, decoding."""
    scheduler = make_scheduler(blocks=64, max_sequences=sequences, **limits)
    for number in range(sequences + 2):
        scheduler.add(replace(request(number, 5, max_tokens=30), fairness_key="flood"))
    step(scheduler)
    step(scheduler)
    return scheduler


def test_a_step_of_who_has_more_than_a_share_gives_way_to_who_comes_and_the_next_one_is_carried_out() -> None:
    scheduler = flooded()
    scheduler.plan()
    assert not scheduler.gives_way
    scheduler.add(replace(request(10, 20, max_tokens=3), fairness_key="quiet"))
    assert scheduler.gives_way
    scheduler.drop_plan()
    assert shape(scheduler.plan()) == [(0, 20, True)]  # the newcomer's prompt alone
    scheduler.add(replace(request(11, 20, max_tokens=3), fairness_key="another"))
    assert not scheduler.gives_way  # twice in a row would be for ever


def test_who_has_more_than_a_share_waits_for_anothers_prompt_and_makes_up_for_each_step_that_it_waited() -> None:
    scheduler = flooded(chunk_tokens=8)
    scheduler.add(replace(request(10, 150, max_tokens=3), fairness_key="quiet"))
    waits = []
    for _ in range(16):
        lengths = [len(row.tokens) for row in step(scheduler).rows]
        assert 8 in lengths  # the prompt is read in every step
        waits.append(lengths == [8])
    assert waits[:MOST_PAUSES] == [True] * MOST_PAUSES
    assert waits[MOST_PAUSES:] == [False, True] * 6


def test_a_flood_of_which_few_run_as_yet_waits_for_another_s_prompt_all_the_same() -> None:
    scheduler = make_scheduler(blocks=64, max_sequences=8, token_budget=8, chunk_tokens=8)
    for number in range(12):
        scheduler.add(replace(request(number, 40, max_tokens=3), fairness_key="flood"))
    scheduler.plan()
    scheduler.add(replace(request(20, 16, max_tokens=3), fairness_key="quiet"))
    assert scheduler.running == 1  # no more than a share of eight places
    assert scheduler.gives_way
    scheduler.drop_plan()
    assert shape(step(scheduler)) == [(0, 8, False)]  # the quiet one's alone, though the flood's came before
    assert shape(step(scheduler)) == [(8, 8, True)]


def test_two_floods_do_not_wait_for_each_other() -> None:
    scheduler = flooded()
    for number in range(10, 16):
        scheduler.add(replace(request(number, 20, max_tokens=3), fairness_key="other"))
    assert len(step(scheduler).rows) > 1
    scheduler.plan()
    scheduler.add(replace(request(20, 20, max_tokens=3), fairness_key="other"))
    assert not scheduler.gives_way


def test_a_step_gives_way_neither_to_its_own_key_nor_where_nobody_has_too_much() -> None:
    scheduler = flooded()
    scheduler.plan()
    scheduler.add(replace(request(10, 20), fairness_key="flood"))
    assert not scheduler.gives_way
    alone = make_scheduler(blocks=64, max_sequences=8)
    alone.add(replace(request(0, 5, max_tokens=30), fairness_key="first"))
    alone.plan()
    alone.add(replace(request(1, 5), fairness_key="second"))
    assert not alone.gives_way  # one of eight places is no more than a share


def test_unfilled_slots_are_those_after_the_last_computed_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 17))
    scheduler.add(request(1, 16))
    step(scheduler)
    assert scheduler.unfilled_slots() == 15


def test_integrity_names_a_lost_table_and_a_misplaced_sequence() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.add(request(0, 40))
    step(scheduler)
    sequence.blocks.pop()  # damage on purpose
    assert {finding.defect for finding in scheduler.check_integrity()} == {Defect.REFERENCES, Defect.TABLE}
    sequence.status = SequenceStatus.WAITING
    assert Defect.QUEUE in {finding.defect for finding in scheduler.check_integrity()}
    assert isinstance(sequence, Sequence)
