from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import pytest

from engine.core import Emission, EngineCore
from engine.request import (
    ContextTooLong,
    EngineDead,
    EngineDraining,
    EngineOverloaded,
    FinishReason,
    GenerationRequest,
    RequestRefused,
    Structure,
    StructureKind,
    TokenDelta,
)
from engine.runtime import COMPILED_AT_ONCE, EngineRuntime, RuntimeTimes, Served
from engine.worker import Abort, Message, Stepped, Tell
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.engine_core import Output, Ticks, make_core, make_prompt, make_request, run_all, take
from tests.support.engine_runtime import MODEL, POLICY, GatedRunner, make_runtime

PATIENCE_S = 20  # how long a test waits for what must happen; never reached when it does


@pytest.fixture
def closing() -> Iterator[Callable[[EngineRuntime, GatedRunner | None], EngineRuntime]]:
    """Closes what is handed to it, its gate opened first, and then finds its books in order."""
    opened: list[tuple[EngineRuntime, GatedRunner | None]] = []

    def note(runtime: EngineRuntime, runner: GatedRunner | None = None) -> EngineRuntime:
        opened.append((runtime, runner))
        return runtime

    yield note
    for runtime, runner in opened:
        if runner is not None:
            runner.gate.set()
        runtime.close()


Closing = Callable[..., EngineRuntime]


def gated(closing: Closing, **options: object) -> tuple[EngineRuntime, GatedRunner, EngineCore]:
    limits = {name: value for name, value in options.items() if isinstance(value, int)}
    others = {name: value for name, value in options.items() if not isinstance(value, int)}
    runner = GatedRunner(1024)
    core = make_core(runner=runner, **limits)
    return closing(make_runtime(core, **others), runner), runner, core


async def read_on(stream: AsyncIterator[TokenDelta], output: Output) -> None:
    async for delta in stream:
        take(output, delta)


async def collect(engine: EngineRuntime, request: GenerationRequest) -> Output:
    output = Output()
    await read_on(engine.generate(request), output)
    return output


async def until(holds: Callable[[], bool]) -> None:
    """Wait for the step thread to get to something a test can only see from outside."""
    for _ in range(PATIENCE_S * 500):
        if holds():
            return
        await asyncio.sleep(0.002)
    pytest.fail("what was waited for never happened")


def idle_and_sound(engine: EngineRuntime, core: EngineCore) -> bool:
    health = engine.health()
    return health.running + health.waiting + health.used_blocks == 0 and core.check_integrity() == ()


async def test_a_stream_carries_what_the_core_generates(closing: Closing) -> None:
    engine = closing(make_runtime(make_core()))
    request = make_request("r", make_prompt(40), 30, seed=3)
    output = await collect(engine, request)
    expected = run_all(make_core(), [request])["r"]
    assert (output.tokens, output.text, output.logprobs) == (expected.tokens, expected.text, expected.logprobs)
    assert output.finish_reason is FinishReason.LENGTH
    assert output.stats is not None


async def test_a_hundred_streams_at_once_each_get_their_own_answer(closing: Closing) -> None:
    core = make_core(max_sequences=32, token_budget=128)
    engine = closing(make_runtime(core))
    requests = [
        make_request(str(index), make_prompt(1 + index, index), 5 + index % 40, seed=index) for index in range(100)
    ]
    outputs = await asyncio.gather(*(collect(engine, request) for request in requests))
    expected = run_all(make_core(), requests)
    assert [output.tokens for output in outputs] == [expected[str(index)].tokens for index in range(100)]
    await until(lambda: idle_and_sound(engine, core))


async def test_closing_the_iterator_aborts_and_frees(closing: Closing) -> None:
    engine, runner, core = gated(closing)
    runner.gate.clear()
    runner.free = 3  # it would otherwise run to its end before a busy machine lets us close it
    stream = engine.generate(make_request("r", make_prompt(100), 1000))
    assert (await anext(stream)).tokens
    await stream.aclose()
    runner.gate.set()
    await until(lambda: idle_and_sound(engine, core))
    assert engine.metrics().finished_abort == 1
    assert runner.steps < 1000


async def test_a_cancelled_consumer_aborts_and_frees(closing: Closing) -> None:
    engine, runner, core = gated(closing)
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, make_request("r", make_prompt(100), 1000)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    runner.gate.set()
    await until(lambda: idle_and_sound(engine, core))


async def test_an_iterator_never_started_costs_nothing(closing: Closing) -> None:
    engine = closing(make_runtime(make_core()))
    stream = engine.generate(make_request("r", [1]))
    await stream.aclose()
    assert engine.metrics().steps == 0


async def test_an_abort_by_id_ends_the_stream_with_a_delta_that_says_so(closing: Closing) -> None:
    engine, runner, _ = gated(closing)
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, make_request("r", make_prompt(20), 1000)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    for _ in range(5000):  # more than the inbox holds: only the first may be sent
        engine.abort("r")
    engine.abort("unknown")
    runner.gate.set()
    output = await task
    assert output.finish_reason is FinishReason.ABORT
    assert output.stats is not None
    assert output.stats.output_tokens == len(output.tokens)


async def test_a_slow_consumer_loses_nothing_and_holds_back_nobody(closing: Closing) -> None:
    engine = closing(make_runtime(make_core()))
    slow = make_request("slow", make_prompt(9), 60, seed=1)
    stream = engine.generate(slow)
    output = Output()
    take(output, await anext(stream))
    await asyncio.gather(*(collect(engine, make_request(f"q{index}", [index], 200)) for index in range(5)))
    await read_on(stream, output)
    assert output.tokens == run_all(make_core(), [slow])["slow"].tokens


async def test_a_step_wakes_a_loop_at_most_once_however_many_streams_it_serves(closing: Closing) -> None:
    engine, runner, _ = gated(closing)
    loop = asyncio.get_running_loop()
    wakes = 0

    class CountingLoop:
        """Hands on to the running loop, and counts."""

        def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> None:
            nonlocal wakes
            wakes += 1
            loop.call_soon_threadsafe(callback, *args)

        def __getattr__(self, name: str) -> object:
            return getattr(loop, name)

    runner.gate.clear()
    blocker = asyncio.create_task(collect(engine, make_request("first", [1], 1)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    tasks = [asyncio.create_task(collect(engine, make_request(str(index), [index], 7))) for index in range(20)]
    await asyncio.sleep(0)
    counting = CountingLoop()
    for stream in engine._in_flight.values():
        stream.loop = counting  # type: ignore[assignment]
    runner.gate.set()
    await asyncio.gather(blocker, *tasks)
    assert 1 <= wakes <= 1 + 7  # steps


async def test_impossible_requests_fail_alone_and_by_name(closing: Closing) -> None:
    engine = closing(make_runtime(make_core(blocks=8, context_length=200)))
    good = make_request("good", make_prompt(20), 40)
    running = asyncio.create_task(collect(engine, good))
    for bad, error in (
        (make_request("long", make_prompt(200)), ContextTooLong),
        (make_request("large", make_prompt(100), 90), RequestRefused),
        (make_request("stray", [50_000]), RequestRefused),
        (make_request("none", [1], 0), RequestRefused),
    ):
        with pytest.raises(error):
            await anext(engine.generate(bad))
    assert (await running).tokens == run_all(make_core(), [good])["good"].tokens


async def test_an_id_in_flight_is_refused_and_its_first_owner_unharmed(closing: Closing) -> None:
    engine, runner, _ = gated(closing)
    runner.gate.clear()
    request = make_request("r", make_prompt(20), 10)
    first = asyncio.create_task(collect(engine, request))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    second = engine.generate(request)
    with pytest.raises(RequestRefused, match="`request_id`"):
        await anext(second)
    await second.aclose()
    runner.gate.set()
    assert len((await first).tokens) == 10
    assert len((await collect(engine, request)).tokens) == 10


async def test_a_full_engine_says_so_and_takes_requests_again_later(closing: Closing) -> None:
    engine, runner, _ = gated(closing, max_sequences=2, waiting_limit=3)
    runner.gate.clear()
    tasks = [asyncio.create_task(collect(engine, make_request(str(index), [index], 3))) for index in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloaded):
        await anext(engine.generate(make_request("more", [1])))
    assert engine.health().running + engine.health().waiting == 5
    runner.gate.set()
    assert [len(output.tokens) for output in await asyncio.gather(*tasks)] == [3] * 5
    assert len((await collect(engine, make_request("more", [1], 2))).tokens) == 2


async def test_a_runner_that_raises_fails_every_request_in_flight_and_later(
    closing: Closing, caplog: pytest.LogCaptureFixture
) -> None:
    engine, runner, _ = gated(closing)
    runner.gate.clear()
    tasks = [asyncio.create_task(collect(engine, make_request(str(index), [index], 50))) for index in range(10)]
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    runner.failure = KeyError("content that must not be logged")
    with caplog.at_level(logging.DEBUG):
        runner.gate.set()
        failures = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(failure) for failure in failures] == [EngineDead] * 10
    with pytest.raises(EngineDead):
        await anext(engine.generate(make_request("later", [1])))
    health = engine.health()
    assert (health.alive, health.running, health.waiting) == (False, 0, 0)
    assert await engine.drain(PATIENCE_S)
    assert "engine_failed at KeyError < engine_runtime.py" in caplog.text
    assert "content" not in caplog.text


async def test_tokens_generated_before_a_failure_are_delivered_before_it(closing: Closing) -> None:
    engine, runner, _ = gated(closing)
    stream = engine.generate(make_request("r", [1], 2000 - 1))
    output = Output()
    take(output, await anext(stream))
    runner.failure = RuntimeError("now")
    with pytest.raises(EngineDead):
        await read_on(stream, output)
    expected = run_all(make_core(), [make_request("r", [1], 1999)], check=False)["r"].tokens
    tokens = output.tokens
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == runner.steps


async def test_a_stuck_step_is_not_alive_fails_what_waits_and_recovers_if_it_ever_ends(
    closing: Closing, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Ticks()
    engine, runner, core = gated(closing, times=RuntimeTimes(stuck_after_s=0.01), clock=clock)
    assert engine.health().last_step_age_s is None
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, make_request("r", [1], 5)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    assert (engine.health().alive, engine.health().last_step_age_s) == (True, 0.0)
    clock.now = 7.0
    assert (engine.health().alive, engine.health().last_step_age_s) == (False, 7.0)
    with pytest.raises(EngineDead, match="no progress"), caplog.at_level(logging.CRITICAL):
        await task
    (report,) = [record.getMessage() for record in caplog.records]  # once, with the place where the step stands
    assert report.startswith("engine_stuck at threading.py")
    assert "engine_runtime.py" in report
    with pytest.raises(EngineDead, match="no progress"):
        await anext(engine.generate(make_request("later", [1])))
    assert engine.health().running + engine.health().waiting == 1  # the later one was not even queued
    runner.gate.set()
    await until(lambda: idle_and_sound(engine, core))
    assert engine.health().alive
    assert len((await collect(engine, make_request("after", [1], 5))).tokens) == 5


async def test_the_heartbeat_counts_from_the_request_not_from_the_idle_time_before(closing: Closing) -> None:
    clock = Ticks()
    engine, runner, _ = gated(closing, clock=clock)
    await collect(engine, make_request("first", [1], 2))
    clock.now = 1000.0
    runner.gate.clear()
    runner.entered.clear()
    task = asyncio.create_task(collect(engine, make_request("second", [1], 2)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    assert engine.health().last_step_age_s == 0.0
    runner.gate.set()
    await task


async def test_draining_lets_everything_end_and_takes_nothing_new(closing: Closing) -> None:
    engine, runner, _ = gated(closing)
    assert runner.gate.is_set()
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, make_request("r", [1], 5)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    assert not await engine.drain(0)
    with pytest.raises(EngineDraining):
        await anext(engine.generate(make_request("more", [1])))
    runner.gate.set()
    assert await engine.drain(PATIENCE_S)
    assert len((await task).tokens) == 5
    assert engine.health().alive


async def test_draining_an_engine_that_dies_ends_with_it(closing: Closing) -> None:
    engine, runner, _ = gated(closing)
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, make_request("r", [1], 5)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    draining = asyncio.create_task(engine.drain(PATIENCE_S))
    await asyncio.sleep(0)
    runner.failure = RuntimeError("now")
    runner.gate.set()
    assert await draining
    with pytest.raises(EngineDead):
        await task


async def test_draining_an_idle_engine_is_done_at_once(closing: Closing) -> None:
    assert await closing(make_runtime(make_core())).drain(0)


async def test_closing_fails_what_is_in_flight_and_may_be_repeated(closing: Closing) -> None:
    engine, runner, _ = gated(closing)
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, make_request("r", [1], 500)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    closer = asyncio.create_task(asyncio.to_thread(engine.close))
    await until(lambda: not engine.health().alive)
    runner.gate.set()
    await closer
    with pytest.raises(EngineDead, match="closed"):
        await task
    engine.close()
    with pytest.raises(EngineDead, match="closed"):
        await anext(engine.generate(make_request("later", [1])))


async def test_closing_a_stuck_engine_does_not_wait_for_it(closing: Closing) -> None:
    engine, runner, _ = gated(closing, times=RuntimeTimes(close_s=0.0))
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, make_request("r", [1], 5)))
    await asyncio.to_thread(runner.entered.wait, PATIENCE_S)
    engine.close()
    with pytest.raises(EngineDead, match="closed"):
        await task


def test_a_loop_closed_under_its_requests_does_not_harm_the_others(closing: Closing) -> None:
    engine, runner, core = gated(closing)

    async def leave_behind() -> TokenDelta:
        stream = engine.generate(make_request("left", make_prompt(30), 1000))
        delta = await anext(stream)
        runner.gate.clear()
        abandoned.append(stream)
        return delta

    abandoned: list[object] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_behind())
    loop.close()
    runner.gate.set()

    async def go_on() -> Output:
        output = await collect(engine, make_request("other", [1], 5))
        await until(lambda: idle_and_sound(engine, core))
        return output

    assert len(asyncio.run(go_on()).tokens) == 5


class WorkerByHand:
    """`worker.Worker`: keeps what it is sent, and tells what the test says."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def begin(self, tell: Tell) -> WorkerByHand:
        self._tell = tell
        return self

    def add_to(self, request_id: str, token: int, finish_reason: FinishReason | None = None) -> None:
        delta = TokenDelta("", (token,), finish_reason=finish_reason)
        self._tell(Stepped([Emission(request_id, delta)], make_core().metrics()))

    def send(self, message: Message) -> None:
        self.messages.append(message)

    async def compile(self, structure: Structure) -> None:
        if structure.source == "endless":
            await asyncio.Event().wait()

    def release(self, compiled: None) -> None: ...

    def report_stuck(self) -> None: ...

    def join(self, timeout_s: float) -> None: ...


def by_hand(worker: WorkerByHand) -> EngineRuntime:
    core = make_core()
    served = Served(MODEL, (), POLICY, core.limits, core.scheduler.pool.total, core.metrics())
    return EngineRuntime(worker.begin, ByteTokenizer(None), served)


async def test_compilations_of_one_loop_hold_up_nobody_in_another() -> None:
    engine = by_hand(WorkerByHand())
    endless = Structure(StructureKind.REGEX, "endless")
    tasks = [asyncio.create_task(engine.prepare(endless)) for _ in range(COMPILED_AT_ONCE + 1)]
    await asyncio.sleep(0)  # the last one waits for the others
    await asyncio.to_thread(asyncio.run, engine.prepare(Structure(StructureKind.REGEX, "quick")))
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in ended] == [asyncio.CancelledError] * len(tasks)
    engine.close()


def test_an_id_whose_loop_was_closed_is_free_once_its_end_was_told() -> None:
    worker = WorkerByHand()
    engine = by_hand(worker)
    request = make_request("again", [1], 9)
    abandoned = engine.generate(request)

    async def leave_behind() -> None:
        first = asyncio.ensure_future(anext(abandoned))
        await until(lambda: len(worker.messages) == 1)
        worker.add_to("again", 1)
        await first

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_behind())
    loop.close()
    worker.add_to("again", 2)
    assert worker.messages[1:] == [Abort("again")]

    async def come_again() -> Output:
        with pytest.raises(RequestRefused, match="in flight"):
            await collect(engine, request)
        worker.add_to("again", 3)  # what a worker told before it knew
        worker.add_to("again", 4, FinishReason.ABORT)
        task = asyncio.create_task(collect(engine, request))
        await until(lambda: len(worker.messages) == 3)
        worker.add_to("again", 5, FinishReason.LENGTH)
        return await task

    assert asyncio.run(come_again()).tokens == [5]
    engine.close()


async def test_idle_bookkeeping_is_checked_and_reported_but_nothing_is_killed(
    closing: Closing, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core()
    core.scheduler.pool.allocate(1)  # a leak: nobody will ever release it
    with caplog.at_level(logging.ERROR):
        engine = closing(make_runtime(core, idle_check_s=0.01))
        await until(lambda: engine.metrics().integrity_findings > 0)
    assert "engine bookkeeping: references" in caplog.text
    assert len((await collect(engine, make_request("r", [1], 3))).tokens) == 3


def test_identity_and_text_come_from_what_it_was_made_of(closing: Closing) -> None:
    engine = closing(make_runtime(make_core(context_length=99)))
    assert (engine.model, engine.numeric_policy, engine.context_length) == (MODEL, POLICY, 99)
    assert engine.render_chat([{"role": "user", "content": "hi"}]) == "<user>hi<assistant>"
    assert engine.encode("é", chat=True) == [195, 169]
    assert engine.decode([195, 169]) == "é"
    assert engine.token_text(195) == b"\xc3"


async def test_preempted_and_cached_streams_carry_the_same_answer(closing: Closing) -> None:
    engine = closing(make_runtime(make_core(blocks=16, token_budget=64)))
    requests = [make_request(str(index), make_prompt(20, index % 3), 150, seed=index % 3) for index in range(12)]
    outputs = await asyncio.gather(*(collect(engine, request) for request in requests))
    assert engine.metrics().preemptions > 0
    for index, output in enumerate(outputs):
        alone = run_all(make_core(), [replace(requests[index], request_id="alone")])["alone"]
        assert output.tokens == alone.tokens


@pytest.mark.parametrize("seed", range(3))
async def test_consumers_that_leave_at_any_moment_leave_nothing_behind(closing: Closing, seed: int) -> None:
    rng = random.Random(seed)
    core = make_core(blocks=24, token_budget=64, max_sequences=12)
    engine = closing(make_runtime(core))
    expected = run_all(make_core(), [make_request("alone", make_prompt(30), 60)])["alone"].tokens

    async def consume(index: int) -> None:
        stay = rng.randrange(80)
        stream = engine.generate(make_request(str(index), make_prompt(30), 60))
        tokens: list[int] = []
        async for delta in stream:
            tokens.extend(delta.tokens)
            if len(tokens) > stay:
                break
        await stream.aclose()
        assert tokens == expected[: len(tokens)]

    tasks = [asyncio.create_task(consume(index)) for index in range(60)]
    for task in rng.sample(tasks, 15):
        await asyncio.sleep(0)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
    await until(lambda: idle_and_sound(engine, core))
    assert engine.health().alive


async def test_what_was_cached_under_a_salt_is_forgotten_by_the_next_step(closing: Closing) -> None:
    engine, _, _ = gated(closing)
    prompt = list(range(40))
    for salt, cached in ((b"one", 0), (b"two", 0), (b"one", 32), (b"two", 32)):
        output = await collect(engine, make_request("r", prompt, 2, salt=salt))
        assert output.stats is not None
        assert output.stats.cached_tokens == cached
    engine.reset_cache(b"one")
    for salt, cached in ((b"one", 0), (b"two", 32)):
        output = await collect(engine, make_request("r", prompt, 2, salt=salt))
        assert output.stats is not None
        assert output.stats.cached_tokens == cached


async def test_who_comes_during_a_step_of_another_s_flood_is_served_before_it_and_aborts_wait_for_its_end(
    closing: Closing,
) -> None:
    engine, runner, core = gated(closing, max_sequences=4)
    flood = [replace(make_request(f"flood-{n}", make_prompt(9, n), 400), fairness_key="flood") for n in range(6)]
    streams = [asyncio.create_task(collect(engine, request)) for request in flood]
    await until(lambda: core.scheduler.running == 4)
    runner.gate.clear()
    runner.entered.clear()
    await until(runner.entered.is_set)
    quiet = asyncio.create_task(collect(engine, replace(make_request("quiet", make_prompt(9, 9), 5), fairness_key="q")))
    await until(lambda: engine.health().waiting + engine.health().running == 7)
    engine.abort("flood-0")
    runner.gate.set()
    assert (await quiet).tokens == run_all(make_core(), [make_request("quiet", make_prompt(9, 9), 5)])["quiet"].tokens
    outputs = [await stream for stream in streams]
    assert outputs[0].finish_reason is FinishReason.ABORT
    expected = run_all(make_core(), flood)
    assert [output.tokens for output in outputs[1:]] == [expected[f"flood-{n}"].tokens for n in range(1, 6)]
    assert engine.metrics().interrupted_steps == engine.health().interrupted_steps == 1
    await until(lambda: idle_and_sound(engine, core))
