"""Makes runtimes on small real cores, and a runner whose steps a test can hold up or break."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from engine.core import EngineCore
from engine.dialect import Dialect
from engine.grammar import Grammars
from engine.plan import Interrupted, StepPlan, StepResult, never
from engine.request import ModelVersion
from engine.runtime import EngineRuntime, RuntimeTimes, Served
from engine.step_thread import IDLE_CHECK_S, StepThread
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.paged_runner import PagedRunner

POLICY = "sha256:" + "1" * 64
MODEL = ModelVersion("tiny", *("sha256:" + digit * 64 for digit in "23456"))


class GatedRunner(PagedRunner):
    """Lets a step through only while its gate is open, but for the first `free`; raises `failure` when that is set."""

    def __init__(self, block_count: int) -> None:
        super().__init__(block_count)
        self.gate = threading.Event()
        self.gate.set()
        self.free = 0
        self.entered = threading.Event()  # a step stands at the gate, or has passed it
        self.failure: BaseException | None = None

    def run(self, plan: StepPlan, interrupted: Interrupted = never) -> StepResult:
        self.entered.set()
        assert self.steps < self.free or self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        return super().run(plan, interrupted)


def make_runtime(
    core: EngineCore,
    *,
    times: RuntimeTimes | None = None,
    kind: type[EngineRuntime] = EngineRuntime,
    clock: Callable[[], float] = time.monotonic,
    grammars: Grammars | None = None,
    dialect: Dialect | None = None,
    idle_check_s: float = IDLE_CHECK_S,
) -> EngineRuntime:
    return kind(
        lambda tell: StepThread(core, tell, grammars=grammars, idle_check_s=idle_check_s),
        ByteTokenizer(dialect),
        Served(MODEL, (), POLICY, core.limits, core.scheduler.pool.total, core.metrics()),
        times=times,
        clock=clock,
    )
