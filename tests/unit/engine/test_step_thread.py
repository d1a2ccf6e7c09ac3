from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest

from engine.core import Emission
from engine.request import FinishReason
from engine.step_thread import StepThread
from engine.worker import Abort, Add, Close, Ended, Event, Stepped
from tests.support.engine_core import make_core, make_prompt, make_request
from tests.support.engine_runtime import GatedRunner

PATIENCE_S = 20


class Told:
    """A step thread over a runner with a gate, and what it tells."""

    def __init__(self) -> None:
        self.runner = GatedRunner(1024)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.thread = StepThread(make_core(runner=self.runner), self._events.put)

    def until(self, holds: Callable[[Event], bool]) -> Event:
        while not holds(event := self._events.get(timeout=PATIENCE_S)):
            pass
        return event

    def end_of(self, request_id: str) -> FinishReason:
        """Return how a request ended, once that is told."""
        found: list[Emission] = []

        def ends(event: Event) -> bool:
            told = event.emissions if isinstance(event, Stepped) else ()
            found[:] = [one for one in told if one.request_id == request_id and one.delta.finish_reason is not None]
            return bool(found)

        self.until(ends)
        reason = found[0].delta.finish_reason
        assert reason is not None
        return reason


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.runner.gate.set()
    made.thread.send(Close())
    assert isinstance(made.until(lambda event: isinstance(event, Ended)), Ended)


def test_an_abort_that_comes_late_does_not_end_the_next_request_of_that_id(told: Told) -> None:
    told.thread.send(Add(make_request("other", make_prompt(9), 1000)))
    told.thread.send(Add(make_request("again", make_prompt(9, 1), 1)))
    assert told.end_of("again") is FinishReason.LENGTH
    told.runner.gate.clear()
    told.runner.entered.clear()
    assert told.runner.entered.wait(PATIENCE_S)  # a step is under way, and takes in both
    told.thread.send(Abort("again"))
    told.thread.send(Add(make_request("again", make_prompt(9, 1), 3)))
    told.runner.gate.set()
    assert told.end_of("again") is FinishReason.LENGTH
    told.thread.send(Abort("other"))
    assert told.end_of("other") is FinishReason.ABORT
