"""EngineRuntime: asyncio's side of an engine, before whoever steps. Implements `request.Engine`.

    event loops ── messages (add, abort, close) ──▶ worker: a thread of this process, or a process
    event loops ◀── deltas (stream.py); of a step at most one call_soon_threadsafe a loop, for who waits ─── worker

The worker is worker.py's; it tells what came of a step on a thread of its own. What the two sides share is
`_in_flight`, under one lock; what is read from outside is a frozen snapshot of the last step. A request is in flight
from `generate` until the worker has told its last delta, so messages are bounded: one add and one abort each.

The heartbeat is the time of the last completed step while anything is in flight. A step older than `stuck_after_s`
makes the engine not alive and fails what waits for it; a worker that ended, or was closed, fails everything for good.
Nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from engine.core import Emission
from engine.dialect import Dialect
from engine.limits import EngineLimits, refuse_impossible
from engine.metrics import EngineMetrics
from engine.request import (
    EngineDead,
    EngineDraining,
    EngineError,
    EngineHealth,
    EngineOverloaded,
    GenerationRequest,
    ModelVersion,
    RequestRefused,
    Rest,
    Structure,
    TokenDelta,
    no_rest,
)
from engine.stream import Stream
from engine.worker import Abort, Add, Checked, Close, Event, Forget, Refused, Stepped, Tell, Trouble, Worker

COMPILED_AT_ONCE = 2  # grammars: of one loop here, of all of them in a process of its own

Report = Callable[[str, Sequence[str]], None]  # an event, and where

logger = logging.getLogger(__name__)


class Codec(Protocol):
    """Text ↔ tokens, as `request.Engine` describes each method. Ours is `tokenizer.Tokenizer`."""

    @property
    def dialect(self) -> Dialect: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        options: Mapping[str, object] | None = None,
    ) -> str: ...

    def encode(self, text: str, *, chat: bool) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def token_text(self, token: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class RuntimeTimes:
    stuck_after_s: float = 60.0  # > 0; a step that takes longer is stuck
    close_s: float = 10.0  # ≥ 0; how long `close` waits for the step under way


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine serves, and within which bounds."""

    model: ModelVersion
    adapted: tuple[ModelVersion, ...]  # versions of the model with each adapter
    numeric_policy: str  # its digest
    limits: EngineLimits
    block_count: int
    metrics: EngineMetrics  # before the first step


_Post = tuple[Stream, TokenDelta | EngineError]


class EngineRuntime:
    def __init__(
        self,
        start: Callable[[Tell], Worker],  # called once, and told where to tell
        codec: Codec,
        served: Served,
        *,
        times: RuntimeTimes | None = None,
        report: Report | None = None,  # of a step that is stuck or failed, and where; without it, a line in the log
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._codec = codec
        self._served = served
        self._versions = MappingProxyType({version.digest: version for version in (served.model, *served.adapted)})
        self._limits = served.limits
        self._times = times or RuntimeTimes()
        self._report = report or _log
        self._reported: float | None = None  # the time of the step that was reported as stuck
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight: dict[str, Stream] = {}  # guarded by the lock, as are the next five
        self._turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}  # to compile, of the loops that asked
        self._pending_since = clock()  # when `_in_flight` last ceased to be empty
        self._death: str | None = None  # why nothing is generated any more
        self._draining = False
        self._drained: Future[None] = Future()
        self._last_step = clock()  # written as the worker tells, as are the next two
        self._findings = 0
        self._snapshot = served.metrics
        self._worker = start(self._hear)

    # What is asked from outside, from any thread.

    @property
    def model(self) -> ModelVersion:
        return self._served.model

    @property
    def versions(self) -> Mapping[str, ModelVersion]:
        return self._versions

    @property
    def numeric_policy(self) -> str:
        return self._served.numeric_policy

    @property
    def context_length(self) -> int:
        return self._limits.context_length

    @property
    def dialect(self) -> Dialect:
        return self._codec.dialect

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        options: Mapping[str, object] | None = None,
    ) -> str:
        return self._codec.render_chat(messages, tools=tools, options=options)

    def encode(self, text: str, *, chat: bool) -> list[int]:
        return self._codec.encode(text, chat=chat)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._codec.decode(tokens)

    def token_text(self, token: int) -> bytes:
        return self._codec.token_text(token)

    async def generate(self, request: GenerationRequest, rest_s: Rest = no_rest) -> AsyncGenerator[TokenDelta, None]:
        """Yield deltas until one carries a finish reason. Closing the iterator aborts the request.

        Raises: RequestRefused, EngineOverloaded, EngineDraining on the first step; EngineDead at any.
        """
        structure = request.sampling.structure
        compiled = await self._compiled(structure) if structure is not None else None
        try:
            stream = self._open(request, compiled)
            self._watch(stream)
            try:
                delta = await stream.next()
                while delta.finish_reason is None:
                    yield delta
                    delta = await stream.next(rest_s())
                yield delta
            finally:
                stream.unwatch()
                self._send_abort(stream)
        finally:
            if compiled is not None:
                self._worker.release(compiled)

    async def prepare(self, structure: Structure) -> None:
        """Raises: RequestRefused: outputs of this structure cannot be generated. EngineDead."""
        self._worker.release(await self._compiled(structure))

    async def _compiled(self, structure: Structure) -> Any:
        try:
            async with asyncio.timeout(self._times.stuck_after_s), self._turn():
                return await self._worker.compile(structure)
        except TimeoutError:
            raise EngineDead("the engine makes no progress") from None

    def _turn(self) -> asyncio.Semaphore:
        """Return what those wait for who compile in this loop: a semaphore cannot wake who waits in another."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._turns:
                self._turns = {one: turn for one, turn in self._turns.items() if not one.is_closed()}
                self._turns[loop] = asyncio.Semaphore(COMPILED_AT_ONCE)
            return self._turns[loop]

    def abort(self, request_id: str) -> None:
        """End a request, if it is in flight; its iterator then ends with a delta that says so."""
        with self._lock:
            stream = self._in_flight.get(request_id)
        if stream is not None:
            self._send_abort(stream)

    def reset_cache(self, cache_salt: bytes) -> None:
        self._worker.send(Forget(cache_salt))

    def health(self) -> EngineHealth:
        snapshot = self._snapshot
        with self._lock:
            in_flight, dead, age = len(self._in_flight), self._death is not None, self._age()
        running = min(snapshot.running, in_flight)
        return EngineHealth(
            alive=not dead and not self._is_stuck(age),
            last_step_age_s=age,
            running=running,
            waiting=in_flight - running,
            free_blocks=snapshot.free_blocks,
            cached_blocks=snapshot.cached_blocks,
            used_blocks=snapshot.used_blocks,
            interrupted_steps=snapshot.interrupted_steps,
        )

    def metrics(self) -> EngineMetrics:
        """Return the figures as they stood after the latest step."""
        return replace(self._snapshot, integrity_findings=self._findings)

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new; return whether all in flight ended within `timeout_s`."""
        with self._lock:
            self._draining = True
            self._settle_drain()
        done, _ = await asyncio.wait({asyncio.wrap_future(self._drained)}, timeout=timeout_s)
        return bool(done)

    def close(self) -> None:
        """Stop the worker after the step under way; what is still in flight fails with EngineDead."""
        with self._lock:
            closing = self._death is None
            if closing:
                self._death = "the engine is closed"
        if closing:
            self._worker.send(Close())
        self._worker.join(self._times.close_s)
        self._die(self._death or "the engine is closed")

    # Shared by both sides.

    def _open(self, request: GenerationRequest, compiled: Any) -> Stream:
        refuse_impossible(request, self._limits, self._served.block_count)
        stream = Stream(request.request_id, asyncio.get_running_loop())
        with self._lock:
            self._refuse_now(request)
            if not self._in_flight:
                self._pending_since = self._clock()
            self._in_flight[request.request_id] = stream
            self._worker.send(Add(request, compiled))
        return stream

    def _refuse_now(self, request: GenerationRequest) -> None:
        if self._death is not None:
            raise EngineDead(self._death)
        if self._draining:
            raise EngineDraining("the engine is draining and takes no new requests")
        if self._is_stuck(self._age()):
            raise EngineDead("the engine makes no progress")
        if len(self._in_flight) >= self._limits.in_flight:
            raise EngineOverloaded(f"{self._limits.in_flight} requests are in flight; try again later")
        if request.request_id in self._in_flight:
            raise RequestRefused("`request_id` is already in flight; use a new one", "request_id")

    def _send_abort(self, stream: Stream) -> None:
        with self._lock:
            if self._in_flight.get(stream.request_id) is not stream or stream.leaving:
                return
            stream.leaving = True
            self._worker.send(Abort(stream.request_id))

    def _age(self) -> float | None:
        """Return the seconds since the last completed step while something is in flight. Call under the lock."""
        if not self._in_flight:
            return None
        return max(0.0, self._clock() - max(self._last_step, self._pending_since))

    def _is_stuck(self, age: float | None) -> bool:
        return age is not None and age > self._times.stuck_after_s

    def _watch(self, stream: Stream) -> None:
        """Fail `stream` if the engine is stuck, now and every so often. Runs in the stream's loop."""
        with self._lock:
            stuck = self._is_stuck(self._age())
            unheard_of = stuck and self._reported != self._last_step
            if unheard_of:
                self._reported = self._last_step
        if unheard_of:
            self._worker.report_stuck()
        if stuck:
            stream.put(EngineDead("the engine makes no progress"))
            stream.wake()
        else:
            stream.watch = stream.loop.call_later(self._times.stuck_after_s, self._watch, stream)

    def _forget(self, streams: Iterable[Stream]) -> None:
        with self._lock:
            for stream in streams:
                self._in_flight.pop(stream.request_id, None)
            self._settle_drain()

    def _settle_drain(self) -> None:
        """Tell who drains that nothing is in flight any more. Call under the lock."""
        if self._draining and not self._in_flight and not self._drained.done():
            self._drained.set_result(None)

    # What the worker tells.

    def _hear(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self._last_step = self._clock()
            self._snapshot = event.metrics
            self._emit(event.emissions)
        elif isinstance(event, Refused):
            stream = self._in_flight.get(event.request_id)
            if stream is not None:
                self._forget([stream])
                self._send([(stream, event.refusal)])
        elif isinstance(event, Checked):
            for finding in event.findings:
                logger.error("engine bookkeeping: %s: %s", finding.defect, finding.message)
            self._findings += len(event.findings)
        elif isinstance(event, Trouble):
            self._report(event.event, event.places)
        else:
            self._die(event.reason)

    def _emit(self, emissions: Sequence[Emission]) -> None:
        posts: list[_Post] = []
        ended: list[Stream] = []
        for emission in emissions:
            stream = self._in_flight.get(emission.request_id)
            if stream is None:  # the engine was closed during this step; the stream knows
                continue
            posts.append((stream, emission.delta))
            if emission.failure is not None:
                posts.append((stream, emission.failure))
            if emission.failure is not None or emission.delta.finish_reason is not None:
                ended.append(stream)
        # Forgotten first: who hears of the end may use the id again.
        if ended:
            self._forget(ended)
        for stream in self._send(posts):
            self._send_abort(stream)  # and it stays in flight until that was told of: its id is not free before

    def _send(self, posts: Iterable[_Post]) -> list[Stream]:
        """Hand each item to its stream, and wake who waits, once per loop; return the streams whose loop is gone."""
        gone: list[Stream] = []
        by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
        for stream, item in posts:
            waited_for = stream.put(item)
            if stream.loop.is_closed():  # under its requests
                gone.append(stream)
            elif waited_for:
                by_loop.setdefault(stream.loop, []).append(stream)
        for loop, waiting in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, waiting)
            except RuntimeError:  # it was closed meanwhile
                gone += waiting
        return gone

    def _die(self, reason: str) -> None:
        with self._lock:
            self._death = reason
            streams = list(self._in_flight.values())
            self._in_flight.clear()
            self._settle_drain()
        self._send([(stream, EngineDead(reason)) for stream in streams])


def _wake(waiting: Iterable[Stream]) -> None:
    for stream in waiting:
        stream.wake()


def _log(event: str, places: Sequence[str]) -> None:
    logger.critical("%s at %s", event, " < ".join(places))
