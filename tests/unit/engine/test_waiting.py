"""The waiting queue: fair between keys, first come first served within one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from engine.blocks import BlockPool
from engine.plan import StepResult
from engine.request import EngineOverloaded, TokenLogprob
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.waiting import WaitingQueue
from tests.support.engine_core import make_limits, make_prompt, make_request


class Line:
    """A queue and the sequences in it."""

    def __init__(self) -> None:
        self.queue = WaitingQueue(1)
        self.arrivals = 0

    def add(self, key: str, weight: int = 1, priority: int = 0) -> Sequence:
        request = make_request(str(self.arrivals), [1])
        request = replace(request, fairness_key=key, weight=weight, priority=priority)
        sequence = Sequence(request, self.arrivals)
        self.arrivals += 1
        self.queue.add(sequence)
        return sequence

    def serve(self, tokens: int = 1) -> Sequence:
        """Let the next one run, and note what was computed for it."""
        sequence = self.queue.next()
        self.queue.pop(sequence)
        self.queue.charge(sequence, tokens)
        return sequence


def keys(sequences: list[Sequence]) -> str:
    return "".join(sequence.request.fairness_key for sequence in sequences)


def test_one_key_is_served_in_order_of_arrival() -> None:
    line = Line()
    added = [line.add("a") for _ in range(5)]
    assert [line.serve() for _ in added] == added
    assert len(line.queue) == 0


def test_keys_take_turns_however_many_wait_for_each() -> None:
    line = Line()
    for key in "aaaaaabb":
        line.add(key)
    assert keys([line.serve(10) for _ in range(8)]) == "ababaaaa"


def test_who_was_given_more_waits_longer() -> None:
    line = Line()
    for key in "abababababbbb":
        line.add(key)
    served = [line.serve(30 if line.queue.next().request.fairness_key == "a" else 10) for _ in range(8)]
    assert keys(served) == "abbbabbb"


def test_a_key_that_comes_late_or_comes_back_brings_no_credit() -> None:
    line = Line()
    for key in "aaaa":
        line.add(key)
    first = [line.serve(100) for _ in range(2)]
    line.add("b")  # at a's count, not at zero: it is not owed what a was given before
    line.add("b")
    assert keys([line.serve(100) for _ in range(4)]) == "baab"
    for sequence in first:
        line.queue.leave(sequence)
    assert set(line.queue._keys) == {"a", "b"}


def test_what_was_preempted_goes_before_what_came_later_for_its_key() -> None:
    line = Line()
    sequences = [line.add(key) for key in "abaab"]
    running = [line.serve() for _ in range(3)]
    for sequence in reversed(running):  # the youngest is preempted first
        line.queue.put_back(sequence)
    assert [one for one in line.queue if one.request.fairness_key == "a"] == [sequences[at] for at in (0, 2, 3)]
    assert line.queue.running == 0


def test_a_weight_is_how_many_turns_a_key_has_for_another_s_one() -> None:
    line = Line()
    for key in "aaaaaabbbbbb":
        line.add(key, weight=3 if key == "a" else 1)
    assert Counter(keys([line.serve(30) for _ in range(8)])) == {"a": 6, "b": 2}


def test_priority_orders_a_key_s_own_and_nobody_else_s() -> None:
    line = Line()
    for key, priority in (("a", 5), ("a", 0), ("b", 9), ("a", -3)):
        line.add(key, priority=priority)
    served = [line.serve(10) for _ in range(4)]
    assert keys(served) == "baaa"  # of a, the one that came last goes first: b is before it
    assert [one.request.priority for one in served if one.request.fairness_key == "a"] == [-3, 0, 5]


def test_counts_are_kept_of_keys_in_flight_only() -> None:
    line = Line()
    rng = random.Random(1)
    in_flight: list[Sequence] = []
    for _ in range(3000):
        if rng.random() < 0.5:
            line.add(f"tenant-{rng.randrange(10_000)}")
        elif len(line.queue) and rng.random() < 0.8:
            in_flight.append(line.serve(rng.randrange(1, 50)))
        elif in_flight:
            line.queue.leave(in_flight.pop(rng.randrange(len(in_flight))))
        present = {sequence.request.fairness_key for sequence in [*line.queue, *in_flight]}
        assert line.queue._keys.keys() == present


def make_flood(scheduler: Scheduler, key: str, count: int = 60, length: int = 30) -> None:
    for number in range(count):
        request = make_request(f"flood-{number}", make_prompt(length, start=number), 20)
        scheduler.add(replace(request, fairness_key=key))


def step(scheduler: Scheduler) -> list[Sequence]:
    """Carry out a step; return which sequences got a token."""
    plan = scheduler.plan()
    assert plan is not None
    sampled = scheduler.commit(StepResult(tuple(tuple(TokenLogprob(7, -1.0) for _ in r.draws) for r in plan.rows)))
    for sequence, _ in sampled:
        if sequence.drawn == sequence.request.sampling.max_tokens:
            scheduler.finish(sequence)
    assert scheduler.check_integrity() == ()
    return [sequence for sequence, _ in sampled]


def steps_until_first_token(key_of_the_flood: str, length: int = 30, blocks: int = 1024) -> int:
    """Return how many steps a newcomer waits behind sixty long requests, four of which run."""
    scheduler = Scheduler(make_limits(max_sequences=4, waiting_limit=100, token_budget=64), BlockPool(blocks))
    make_flood(scheduler, key_of_the_flood, length=length)
    for _ in range(10):
        step(scheduler)
    newcomer = scheduler.add(make_request("newcomer", make_prompt(30, start=5000), 20))  # key: tenant
    for waited in range(1, 2000):
        if newcomer in step(scheduler):
            return waited
    raise AssertionError("the newcomer never had a token")


@pytest.mark.parametrize(("length", "blocks"), [(30, 1024), (30, 14), (600, 1024)])
def test_a_newcomer_is_answered_at_once_behind_a_flood_and_last_behind_its_own(length: int, blocks: int) -> None:
    if length == 600:  # its prompts alone would take the whole of every step
        blocks = 4 * 40 + 1
    assert steps_until_first_token("another", length, blocks) == 1
    assert steps_until_first_token("tenant", length, blocks) > 50


def test_a_flood_gives_back_places_down_to_its_share_and_every_other_step() -> None:
    scheduler = Scheduler(make_limits(max_sequences=6, waiting_limit=200, token_budget=64), BlockPool(1024))
    make_flood(scheduler, "flood")
    for _ in range(4):
        step(scheduler)
    for number in range(40):  # a second flood: half of the places are its own
        scheduler.add(make_request(f"second-{number}", make_prompt(20, start=9000 + number), 20))
    for _ in range(12):
        step(scheduler)
    running = Counter(sequence.request.fairness_key for sequence in scheduler.sequences if sequence.blocks)
    assert running == {"flood": 3, "tenant": 3}
    preemptions = scheduler.counters.preemptions
    for _ in range(200):
        step(scheduler)
    assert scheduler.counters.preemptions == preemptions  # each within its share, nobody is preempted any more


def test_a_key_that_floods_is_refused_while_others_are_taken() -> None:
    limits = make_limits(max_sequences=4, waiting_limit=12, token_budget=64, key_limit=12)
    scheduler = Scheduler(limits, BlockPool(1024))
    make_flood(scheduler, "flood", count=12)
    with pytest.raises(EngineOverloaded, match="of this caller"):
        make_flood(scheduler, "flood", count=1)
    scheduler.add(make_request("quiet", make_prompt(30), 20))


def test_everything_of_every_key_ends_under_many_floods_and_few_blocks() -> None:
    scheduler = Scheduler(make_limits(max_sequences=8, waiting_limit=400, token_budget=40), BlockPool(20))
    for number in range(120):
        request = make_request(str(number), make_prompt(1 + 13 * number % 90, start=number), 1 + number % 30)
        scheduler.add(replace(request, fairness_key="abcde"[number * number % 5], weight=1 + number % 3))
    for _ in range(4000):
        if not scheduler.running + scheduler.waiting:
            break
        step(scheduler)
    assert scheduler.running + scheduler.waiting == 0
