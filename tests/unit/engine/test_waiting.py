"""The waiting queue: fair between keys, first come first served within one."""

from __future__ import annotations

import random
from dataclasses import replace

from engine.blocks import BlockPool
from engine.plan import StepResult
from engine.request import TokenLogprob
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.waiting import WaitingQueue
from tests.support.engine_core import make_limits, make_prompt, make_request


class Line:
    """A queue and the sequences in it."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self.arrivals = 0

    def add(self, key: str) -> Sequence:
        request = replace(make_request(str(self.arrivals), [1]), fairness_key=key)
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
    assert keys([line.serve(100) for _ in range(4)]) == "abab"
    for sequence in first:
        line.queue.leave(sequence)
    assert set(line.queue._counts) == {"a", "b"}


def test_what_was_preempted_goes_first_and_the_oldest_of_it_before_all() -> None:
    line = Line()
    sequences = [line.add(key) for key in "abab"]
    running = [line.serve() for _ in range(3)]
    for sequence in reversed(running):  # the youngest is preempted first
        line.queue.put_back(sequence)
    assert list(line.queue)[:3] == running
    assert [line.serve() for _ in range(4)] == [*running, sequences[3]]


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
        assert line.queue._counts.keys() == present


def steps_until_first_token(keys_of_the_flood: str) -> int:
    """Return how many steps a newcomer waits behind sixty long requests, four of which run."""
    scheduler = Scheduler(make_limits(max_sequences=4, waiting_limit=100, token_budget=64), BlockPool(1024))
    for number in range(60):
        request = make_request(f"flood-{number}", make_prompt(30, start=number), 20)
        scheduler.add(replace(request, fairness_key=keys_of_the_flood))
    newcomer: Sequence | None = None
    for step in range(1, 2000):
        plan = scheduler.plan()
        assert plan is not None
        sampled = scheduler.commit(StepResult(tuple(tuple(TokenLogprob(7, -1.0) for _ in r.draws) for r in plan.rows)))
        assert scheduler.check_integrity() == ()
        for sequence, _ in sampled:
            if sequence is newcomer:
                return step - 10
            if sequence.drawn == 20:
                scheduler.finish(sequence)
        if step == 10:
            newcomer = scheduler.add(make_request("newcomer", make_prompt(30, start=5000), 20))  # key: tenant
    raise AssertionError("the newcomer never had a token")


def test_a_newcomer_is_next_behind_a_flood_of_another_key_and_last_behind_its_own() -> None:
    beside = steps_until_first_token("another")
    behind = steps_until_first_token("tenant")
    assert beside <= 20  # one of four places is free by then
    assert behind > 10 * beside
