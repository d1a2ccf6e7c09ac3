"""The engine in a process of its own: the same answers, and nothing of it is left when either side ends."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, EngineStartError, UnsupportedModel
from engine.engine_process import EngineProcess, start_engine
from engine.load import load_engine
from engine.reading import WeightsError
from engine.request import (
    EngineDead,
    FinishReason,
    GenerationRequest,
    RequestRefused,
    SamplingParams,
    Structure,
    StructureKind,
    TokenDelta,
)
from engine.runtime import COMPILED_AT_ONCE, EngineRuntime
from engine.worker import Abort, Close, Ended, Event, Trouble
from gateway.app import load_model
from gateway.settings import load_settings
from tests.support.children import children

PATIENCE_S = 30  # how long a test waits for what must happen; never reached when it does
SCHEMA = json.dumps(
    {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
)


def config(directory: Path, **values: object) -> EngineConfig:
    """Return a small engine's, whose kernels are torch's: to compile takes seconds at every start."""
    sizes = {"threads": 1, "kv_cache_mib": 4, "max_sequences": 8, "max_tokens_per_step": 64, "compiled": False} | values
    return EngineConfig(directory, **sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(tiny_models: dict[str, Path]) -> Iterator[EngineRuntime]:
    running = start_engine(config(tiny_models["wide"], compiled=True))
    yield running
    running.close()


class Watched:
    """An engine of a test's own, what it reported, and its process."""

    def __init__(self, directory: Path, **values: object) -> None:
        self.reports: list[tuple[str, Sequence[str]]] = []
        before = children()
        self.engine = start_engine(config(directory, **values), report=lambda *event: self.reports.append(event))
        (self.pid,) = children() - before


@pytest.fixture
def start(tiny_models: dict[str, Path]) -> Iterator[Callable[..., Watched]]:
    started: list[Watched] = []

    def one(**values: object) -> Watched:
        started.append(Watched(tiny_models["wide"], **values))
        return started[-1]

    yield one
    for watched in started:
        watched.engine.close()
        assert watched.pid not in children()


def ask(engine: EngineRuntime, name: str, tokens: int = 30, **sampling: object) -> GenerationRequest:
    text = engine.render_chat([{"role": "user", "content": f"Wie viel kostet ein Konto, {name}? " * 8}])
    prompt = tuple(engine.encode(text, chat=True))
    params = {"max_tokens": tokens, "seed": 11, "temperature": 0.8, "logprobs": True, "ignore_eos": True} | sampling
    return GenerationRequest(name, prompt, SamplingParams(**params), b"salt", "tenant")  # type: ignore[arg-type]


async def answer(engine: EngineRuntime, request: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(request)]


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_S * 100):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("what was waited for never happened")


def idle(engine: EngineRuntime) -> bool:
    health = engine.health()
    return health.running + health.waiting + health.used_blocks == 0


async def test_answers_have_the_bits_that_a_thread_gives_them(
    engine: EngineRuntime, tiny_models: dict[str, Path]
) -> None:
    threads = torch.get_num_threads()
    beside = load_engine(config(tiny_models["wide"], compiled=True))
    try:
        requests = [ask(beside, f"r{n}", 5 + 9 * n, top_logprobs=n, prompt_logprobs=n) for n in range(6)]
        expected = await asyncio.gather(*(answer(beside, request) for request in requests))
        assert (engine.numeric_policy, engine.model) == (beside.numeric_policy, beside.model)
        assert (engine.versions, engine.context_length) == (beside.versions, beside.context_length)
        assert engine.render_chat([{"role": "user", "content": "a"}]) == beside.render_chat(
            [{"role": "user", "content": "a"}]
        )
    finally:
        beside.close()
        torch.set_num_threads(threads)
    found = await asyncio.gather(*(answer(engine, request) for request in requests))
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for delta in ours for token in delta.tokens] == [t for delta in theirs for t in delta.tokens]
        assert [one for delta in ours for one in delta.logprobs] == [one for d in theirs for one in d.logprobs]
        assert ours[0].prompt_logprobs == theirs[0].prompt_logprobs
        assert "".join(delta.text for delta in ours) == "".join(delta.text for delta in theirs)
        assert (ours[-1].stats is None) is (theirs[-1].stats is None) is False
        assert ours[-1].stats.replay_digest == theirs[-1].stats.replay_digest  # type: ignore[union-attr]
    await until(lambda: idle(engine))


async def test_a_structure_is_compiled_there_and_enforced_there(engine: EngineRuntime) -> None:
    structure = Structure(StructureKind.JSON_SCHEMA, SCHEMA)
    await engine.prepare(structure)
    for n in range(5):
        request = ask(engine, f"structured-{n}", 60, structure=structure, ignore_eos=False, seed=n)
        text = "".join(delta.text for delta in await answer(engine, request))
        assert json.loads(text)["n"] in (1, 2)


async def test_a_structure_that_cannot_be_enforced_is_refused_by_its_keyword(engine: EngineRuntime) -> None:
    structure = Structure(StructureKind.JSON_SCHEMA, json.dumps({"type": "array", "uniqueItems": True}))
    with pytest.raises(RequestRefused, match="`uniqueItems`") as refused:
        await engine.prepare(structure)
    assert refused.value.param == "response_format"
    with pytest.raises(RequestRefused, match="`uniqueItems`"):
        await answer(engine, ask(engine, "unenforced", structure=structure, ignore_eos=False))


async def test_a_compiler_that_fails_refuses_that_structure_alone_and_at_once(start: Callable[..., Watched]) -> None:
    watched = start()
    for _ in range(COMPILED_AT_ONCE + 1):
        with pytest.raises(RequestRefused, match="cannot be compiled"):
            await watched.engine.prepare(Structure(StructureKind.MESSAGE, '{"secret": 1}'))  # as nobody writes it
    await watched.engine.prepare(Structure(StructureKind.JSON_SCHEMA, SCHEMA))
    assert {event for event, _ in watched.reports} == {"compile_failed"}
    assert "secret" not in str(watched.reports)


async def test_who_gives_up_while_a_structure_is_compiled_leaves_nothing_behind(engine: EngineRuntime) -> None:
    for n in range(8):
        schema = json.dumps({"type": "string", "maxLength": 100 + n})
        request = ask(engine, f"gone-{n}", structure=Structure(StructureKind.JSON_SCHEMA, schema), ignore_eos=False)
        task = asyncio.create_task(answer(engine, request))
        await asyncio.sleep(0.001 * n)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: idle(engine))
    assert len(await answer(engine, ask(engine, "after", 5))) > 0


async def test_compilations_that_nobody_waited_for_are_remembered_nowhere(engine: EngineRuntime) -> None:
    before = waited_for()
    for n in range(50):
        schema = json.dumps({"type": "string", "maxLength": 200 + n})
        await give_up(asyncio.create_task(engine.prepare(Structure(StructureKind.JSON_SCHEMA, schema))))
    await engine.prepare(Structure(StructureKind.JSON_SCHEMA, SCHEMA))  # and told of after all of them
    await until(lambda: waited_for() == before)


async def give_up(task: asyncio.Task[None]) -> None:
    await asyncio.sleep(0)  # it is on its way to the child
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def waited_for() -> int:
    gc.collect()
    return sum(type(one) is Future for one in gc.get_objects())


async def test_what_the_step_refuses_comes_back_as_what_it_is(engine: EngineRuntime) -> None:
    with pytest.raises(RequestRefused, match="`adapter` is not loaded") as refused:
        await answer(engine, replace(ask(engine, "r"), adapter="none"))
    assert refused.value.param == "adapter"


async def test_leaving_and_aborting_end_the_generation_there(engine: EngineRuntime) -> None:
    async with aclosing(engine.generate(ask(engine, "left", 700))) as deltas:
        async for delta in deltas:
            if delta.tokens:
                break
    await until(lambda: idle(engine))
    task = asyncio.create_task(answer(engine, ask(engine, "aborted", 700)))
    await until(lambda: engine.health().running == 1)
    engine.abort("aborted")
    assert (await task)[-1].finish_reason is FinishReason.ABORT
    await until(lambda: idle(engine))


async def test_a_salt_is_forgotten_there(engine: EngineRuntime) -> None:
    async def cached(name: str) -> int:
        stats = (await answer(engine, replace(ask(engine, "same", 1), request_id=name, cache_salt=b"other")))[-1].stats
        assert stats is not None
        return stats.cached_tokens

    assert (await cached("1"), await cached("2") > 0) == (0, True)
    for _ in range(100):
        engine.reset_cache(b"other")
    assert await cached("3") == 0


async def test_signals_that_mean_the_gateway_do_not_end_it(start: Callable[..., Watched]) -> None:
    watched = start()
    for one in (signal.SIGTERM, signal.SIGINT):
        os.kill(watched.pid, one)
    assert len(await answer(watched.engine, ask(watched.engine, "r", 5))) > 0
    assert watched.reports == []


async def test_a_process_that_is_killed_fails_what_is_in_flight_and_all_that_comes(
    start: Callable[..., Watched],
) -> None:
    watched = start()
    streams = [asyncio.create_task(answer(watched.engine, ask(watched.engine, f"r{n}", 800))) for n in range(6)]
    await until(lambda: watched.engine.health().running == 6)
    os.kill(watched.pid, signal.SIGKILL)
    failures = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(failure) for failure in failures] == [EngineDead] * 6
    with pytest.raises(EngineDead):
        await answer(watched.engine, ask(watched.engine, "later"))
    with pytest.raises(EngineDead):
        await watched.engine.prepare(Structure(StructureKind.JSON_SCHEMA, SCHEMA))
    assert not watched.engine.health().alive
    assert watched.reports == [("engine_failed", [f"process {watched.pid} ended with -9"])]


async def test_a_process_that_is_stopped_is_stuck_until_it_goes_on(start: Callable[..., Watched]) -> None:
    watched = start(stuck_after_s=0.3)
    assert len(await answer(watched.engine, ask(watched.engine, "before", 5))) > 0
    os.kill(watched.pid, signal.SIGSTOP)
    with pytest.raises(EngineDead, match="no progress"):
        await answer(watched.engine, ask(watched.engine, "r"))
    with pytest.raises(EngineDead, match="no progress"):
        await watched.engine.prepare(Structure(StructureKind.JSON_SCHEMA, SCHEMA))
    assert not watched.engine.health().alive
    assert watched.reports == [("engine_stuck", [f"process {watched.pid}"])]
    os.kill(watched.pid, signal.SIGCONT)
    await until(lambda: watched.engine.health().alive)
    await until(lambda: len(watched.reports) == 2)  # the place, as soon as it could be told
    assert watched.reports[1][0] == "engine_stuck"
    assert len(await answer(watched.engine, ask(watched.engine, "after", 5))) > 0


def test_a_process_that_does_not_end_when_it_is_told_to_is_killed(tiny_models: dict[str, Path]) -> None:
    before = children()
    process = EngineProcess(config(tiny_models["wide"]))
    events: list[Event] = []
    process.begin(events.append)
    os.kill(process.pid, signal.SIGSTOP)
    process.send(Close())
    process.join(0.1)
    assert children() == before
    assert events == [Ended("the engine is closed")]


async def test_a_process_whose_step_fails_is_buried(tiny_models: dict[str, Path]) -> None:
    before = children()
    process = EngineProcess(config(tiny_models["wide"]))
    events: list[Event] = []
    process.begin(events.append)
    process.send(Abort([]))  # type: ignore[arg-type]  # no id: what looks for it fails
    await until(lambda: Ended("the engine failed") in events)
    await until(lambda: children() == before)


async def test_what_cannot_be_sent_ends_it_by_name(tiny_models: dict[str, Path]) -> None:
    before = children()
    process = EngineProcess(config(tiny_models["wide"]))
    events: list[Event] = []
    process.begin(events.append)
    process.send(Abort(lambda: None))  # type: ignore[arg-type]  # which no pickle holds
    await until(lambda: Ended("the engine failed") in events)
    assert events[0] == Trouble("engine_failed", [f"process {process.pid} ended with -9"])
    await until(lambda: children() == before)


def test_what_refuses_to_start_says_the_same_and_leaves_no_process(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    before = children()
    with pytest.raises(WeightsError, match="not a directory"):
        start_engine(config(tmp_path / "none"))
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in tiny_models["wide"].iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    values = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(values | {"quantization_config": {"bits": 4}}))
    with pytest.raises(UnsupportedModel, match="`quantization_config`"):
        start_engine(config(wrong))
    assert children() == before


def test_a_process_that_ends_while_it_loads_is_a_refusal_to_start(tiny_models: dict[str, Path]) -> None:
    before = children()

    def kill(name: str, done: int, size: int) -> None:
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineStartError, match="ended with -9 while it loaded"):
        start_engine(config(tiny_models["wide"]), progress=kill)
    assert children() == before


class KillsWhoReadsIt:
    """Stands in a configuration. Before it is sent, who was to read it is dead."""

    def __init__(self, but: set[int]) -> None:
        self._but = but

    def __reduce__(self) -> tuple[type[Path], tuple[str]]:
        for pid in children() - self._but:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return Path, ("anywhere",)


def test_a_process_that_ends_before_it_is_told_what_to_load_is_a_refusal_to_start() -> None:
    before = children()
    with pytest.raises(EngineStartError, match="ended with -9 while it loaded"):
        start_engine(replace(config(Path()), model=KillsWhoReadsIt(before)))  # type: ignore[arg-type]
    assert children() == before


ORPHANED = """
import sys, time
from pathlib import Path
from engine.config import EngineConfig
from engine.engine_process import EngineProcess
print(sorted({"torch", "triton", "transformers"} & set(sys.modules)), flush=True)
config = EngineConfig(Path(sys.argv[1]), threads=1, compiled=False, max_sequences=8, max_tokens_per_step=64)
process = EngineProcess(config, lambda *progress: print("loading", flush=True))
print(process.pid, flush=True)
print(sorted({"torch", "triton", "transformers"} & set(sys.modules)), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("when", ["loading", "ready"])
def test_it_ends_with_the_process_that_started_it_which_needs_no_torch(tiny_models: dict[str, Path], when: str) -> None:
    gateway = subprocess.Popen(
        [sys.executable, "-c", ORPHANED, str(tiny_models["wide"])],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with gateway:
        assert gateway.stdout is not None
        assert gateway.stdout.readline() == "[]\n"
        assert gateway.stdout.readline() == "loading\n"
        (pid,) = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split()
        if when == "ready":
            while (said := gateway.stdout.readline()) == "loading\n":
                pass
            assert said == f"{pid}\n"
            assert gateway.stdout.readline() == "[]\n"
        gateway.kill()
    asyncio.run(until(lambda: not Path(f"/proc/{pid}").exists()))


def test_no_setting_of_the_gateway_reaches_it(start: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBITY_DATABASE_URL", "postgresql://a:secret@localhost/b")
    monkeypatch.setenv("OTHER", "kept")
    environment = Path(f"/proc/{start().pid}/environ").read_bytes()
    assert b"OTHER=kept" in environment
    assert b"PROBITY_" not in environment


@pytest.mark.parametrize(("where", "processes"), [("thread", 0), ("process", 1)])
def test_the_setting_says_where_the_engine_steps(tmp_path: Path, where: str, processes: int) -> None:
    before, threads = children(), torch.get_num_threads()
    running = load_model(
        load_settings(None, {}, {"data_dir": str(tmp_path), "engine.runs_in": where, "engine.kernels": "library"})
    )
    try:
        assert len(children() - before) == processes
    finally:
        running.close()
        torch.set_num_threads(threads)
    assert children() == before


async def test_one_that_is_closed_before_anything_was_asked_is_gone(tiny_models: dict[str, Path]) -> None:
    before = children()
    process = EngineProcess(config(tiny_models["wide"]))
    process.kill()
    assert children() == before
    watched = Watched(tiny_models["wide"])
    watched.engine.close()
    watched.engine.close()
    assert children() == before
    with pytest.raises(EngineDead, match="closed"):
        await answer(watched.engine, ask(watched.engine, "later"))
    assert watched.reports == []


@pytest.fixture(autouse=True)
async def _nothing_is_left_over(engine: EngineRuntime) -> AsyncIterator[None]:
    yield
    await until(lambda: idle(engine))
    assert engine.metrics().integrity_findings == 0
