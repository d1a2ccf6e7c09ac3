"""EngineRuntime: the thread that steps, and asyncio's side of it. Implements `request.Engine` on one EngineCore.

    event loops ── messages (add, abort, close) ──▶ inbox ──▶ step thread: core.add / abort / step
    event loops ◀── one call_soon_threadsafe per step and loop, with every delta of that step ───┘

Only the step thread touches the core. What the two sides share is `_in_flight`, under one lock; what is read from
outside is a frozen snapshot taken after every step. A request is in flight from `generate` until the step thread has
sent its last delta, so messages are bounded: one add and one abort each.

The heartbeat is the time of the last completed step while anything is in flight. A step older than `stuck_after_s`
makes the engine not alive and fails what waits for it; a thread that died, or was closed, fails everything for good.
Nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from engine.core import Emission, EngineCore
from engine.dialect import Dialect
from engine.grammar import Grammars, Start
from engine.limits import refuse_impossible
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
    Structure,
    TokenDelta,
)
from engine.stream import Stream

COMPILED_AT_ONCE = 2  # grammars
MAX_FRAMES = 12  # of a stack that is reported

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
    idle_check_s: float = 5.0  # > 0; idle time after which the bookkeeping is checked, once
    close_s: float = 10.0  # ≥ 0; how long `close` waits for the step under way


@dataclass(frozen=True, slots=True)
class _Add:
    request: GenerationRequest
    stream: Stream
    start: Start | None  # of its structure


@dataclass(frozen=True, slots=True)
class _Abort:
    stream: Stream


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Message = _Add | _Abort | _Close
_Post = tuple[Stream, TokenDelta | EngineError]


class EngineRuntime:
    def __init__(
        self,
        core: EngineCore,
        codec: Codec,
        model: ModelVersion,
        numeric_policy: str,
        *,
        adapted: Iterable[ModelVersion] = (),  # versions of the model with each adapter of the core
        grammars: Grammars | None = None,  # none: structures are refused
        times: RuntimeTimes | None = None,
        report: Report | None = None,  # of a step that is stuck or failed, and where; without it, a line in the log
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._codec = codec
        self._model = model
        self._versions = MappingProxyType({version.digest: version for version in (model, *adapted)})
        self._numeric_policy = numeric_policy
        self._grammars = grammars
        self._compiling = asyncio.Semaphore(COMPILED_AT_ONCE)
        self._limits = core.limits
        self._block_count = core.scheduler.pool.total
        self._times = times or RuntimeTimes()
        self._report = report or _log
        self._reported: float | None = None  # the time of the step that was reported as stuck
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight: dict[str, Stream] = {}  # guarded by the lock, as are the next five
        self._pending_since = clock()  # when `_in_flight` last ceased to be empty
        self._death: str | None = None  # why nothing is generated any more
        self._draining = False
        self._drained: Future[None] = Future()
        self._to_forget: set[bytes] = set()  # salts
        self._inbox: queue.Queue[_Message] = queue.Queue(2 * self._limits.in_flight + 1)
        self._set_aside: deque[_Message] = deque()  # taken in during a step; an abort at most of each request in flight
        self._last_step = clock()  # written by the step thread, as are the next two
        self._findings = 0
        self._snapshot = core.metrics()
        self._thread = threading.Thread(target=self._work, name="probity-engine", daemon=True)
        self._thread.start()

    # What is asked from outside, from any thread.

    @property
    def model(self) -> ModelVersion:
        return self._model

    @property
    def versions(self) -> Mapping[str, ModelVersion]:
        return self._versions

    @property
    def numeric_policy(self) -> str:
        return self._numeric_policy

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

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield deltas until one carries a finish reason. Closing the iterator aborts the request.

        Raises: RequestRefused, EngineOverloaded, EngineDraining on the first step; EngineDead at any.
        """
        structure = request.sampling.structure
        stream = self._open(request, await self._compiled(structure) if structure is not None else None)
        self._watch(stream)
        try:
            while True:
                delta = await stream.next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            stream.unwatch()
            self._send_abort(stream)

    async def prepare(self, structure: Structure) -> None:
        """Raises: RequestRefused: outputs of this structure cannot be generated."""
        await self._compiled(structure)

    async def _compiled(self, structure: Structure) -> Start:
        if self._grammars is None:
            raise RequestRefused("this engine knows no structured output; install `llguidance`", "response_format")
        async with self._compiling:
            return await asyncio.to_thread(self._grammars.compile, structure)

    def abort(self, request_id: str) -> None:
        """End a request, if it is in flight; its iterator then ends with a delta that says so."""
        with self._lock:
            stream = self._in_flight.get(request_id)
        if stream is not None:
            self._send_abort(stream)

    def reset_cache(self, cache_salt: bytes) -> None:
        with self._lock:
            self._to_forget.add(cache_salt)

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
        """Stop the step thread after the step under way; what is still in flight fails with EngineDead."""
        with self._lock:
            closing = self._death is None
            if closing:
                self._death = "the engine is closed"
        if closing:
            self._inbox.put_nowait(_Close())
        self._thread.join(self._times.close_s)
        if self._thread.is_alive():
            self._die("the engine is closed")

    # Shared by both sides.

    def _open(self, request: GenerationRequest, start: Start | None) -> Stream:
        refuse_impossible(request, self._limits, self._block_count)
        stream = Stream(request.request_id, asyncio.get_running_loop())
        with self._lock:
            self._refuse_now(request)
            if not self._in_flight:
                self._pending_since = self._clock()
            self._in_flight[request.request_id] = stream
            self._inbox.put_nowait(_Add(request, stream, start))
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
            self._inbox.put_nowait(_Abort(stream))

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
            self._report("engine_stuck", self._where())
        if stuck:
            stream.put(EngineDead("the engine makes no progress"))
        else:
            stream.watch = stream.loop.call_later(self._times.stuck_after_s, self._watch, stream)

    def _where(self) -> list[str]:
        """Return where the step thread stands, innermost first."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return _places(traceback.extract_stack(frame)) if frame is not None else []

    def _forget(self, streams: Iterable[Stream]) -> None:
        with self._lock:
            for stream in streams:
                self._in_flight.pop(stream.request_id, None)
            self._settle_drain()

    def _settle_drain(self) -> None:
        """Tell who drains that nothing is in flight any more. Call under the lock."""
        if self._draining and not self._in_flight and not self._drained.done():
            self._drained.set_result(None)

    # The step thread.

    def _work(self) -> None:
        try:
            while self._receive():
                emissions = self._core.step(self._take_in)
                self._last_step = self._clock()
                self._snapshot = self._core.metrics()
                self._emit(emissions)
        except BaseException as error:
            # Whatever it is, nobody may be left waiting for it. Its message may hold content; its place does not.
            self._report("engine_failed", [type(error).__name__, *_places(traceback.extract_tb(error.__traceback__))])
            self._die("the engine failed")
        else:
            self._die("the engine is closed")

    def _receive(self) -> bool:
        """Handle every message there is, waiting for one if there is no work; return whether to go on."""
        message = self._set_aside.popleft() if self._set_aside else self._first_message()
        while message is not None:
            if isinstance(message, _Close):
                return False
            self._handle(message)
            message = self._set_aside.popleft() if self._set_aside else self._poll()
        self._reset_caches()
        return True

    def _take_in(self) -> None:
        """While a step is under way, let its scheduler know who has come; the rest waits for its end."""
        message = self._poll()
        while message is not None:
            if isinstance(message, _Add):
                self._handle(message)
            else:
                self._set_aside.append(message)
            message = self._poll()

    def _reset_caches(self) -> None:
        with self._lock:
            salts, self._to_forget = self._to_forget, set()
        for salt in salts:
            self._core.reset_cache(salt)

    def _first_message(self) -> _Message | None:
        if self._core.has_work:
            return self._poll()
        self._snapshot = self._core.metrics()
        try:
            return self._inbox.get(timeout=self._times.idle_check_s)
        except queue.Empty:
            self._check_integrity()
            return self._inbox.get()

    def _poll(self) -> _Message | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            return None

    def _handle(self, message: _Add | _Abort) -> None:
        if isinstance(message, _Abort):
            emission = self._core.abort(message.stream.request_id)
            if emission is not None:
                self._emit([emission])
            return
        try:
            self._core.add(message.request, message.start)
        except EngineError as refusal:
            self._forget([message.stream])
            self._send([(message.stream, refusal)])

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
        gone = self._send(posts)
        for stream in gone:
            self._core.abort(stream.request_id)
        if gone:
            self._forget(gone)

    def _send(self, posts: Iterable[_Post]) -> list[Stream]:
        """Hand each item to its stream, once per loop; return the streams whose loop is gone."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Post]] = {}
        for post in posts:
            by_loop.setdefault(post[0].loop, []).append(post)
        gone: list[Stream] = []
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the loop was closed under its requests
                gone.extend(stream for stream, _ in batch)
        return gone

    def _check_integrity(self) -> None:
        findings = self._core.check_integrity()
        for finding in findings:
            logger.error("engine bookkeeping: %s: %s", finding.defect, finding.message)
        self._findings += len(findings)

    def _die(self, reason: str) -> None:
        with self._lock:
            self._death = reason
            streams = list(self._in_flight.values())
            self._in_flight.clear()
            self._settle_drain()
        self._send([(stream, EngineDead(reason)) for stream in streams])


def _deliver(batch: Iterable[_Post]) -> None:
    for stream, item in batch:
        stream.put(item)


def _places(frames: traceback.StackSummary) -> list[str]:
    """Return where frames stand, innermost first: names and lines, no values."""
    return [f"{Path(frame.filename).name}:{frame.lineno}:{frame.name}" for frame in reversed(frames[-MAX_FRAMES:])]


def _log(event: str, places: Sequence[str]) -> None:
    logger.critical("%s at %s", event, " < ".join(places))
