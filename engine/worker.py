"""Worker: who steps, as the runtime sees it. A thread here (step_thread.py) or another process (engine_process.py).

    runtime ── Add, Abort, Forget, Close ──────────────────────────▶ mailbox ▶ worker
    runtime ◀── Stepped, Refused, Checked, Trouble, Ended ── `tell`, on a thread of the worker's own

Messages are handled in the order they were sent, but that requests are taken in during a step and the rest after it.
All of it is values: a message or an event may come from, or go to, another process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from engine.blocks import Finding
from engine.core import Emission
from engine.metrics import EngineMetrics
from engine.request import EngineError, GenerationRequest, Structure


@dataclass(frozen=True, slots=True)
class Add:
    request: GenerationRequest
    compiled: Any = None  # of its structure: what `Worker.compile` returned


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Let nothing be found again that was cached under a salt."""

    cache_salt: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """Step no more."""


Message = Add | Abort | Forget | Close


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step added, or an abort ended; and how the engine stands after it."""

    emissions: Sequence[Emission]
    metrics: EngineMetrics


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was never taken in."""

    request_id: str
    refusal: EngineError


@dataclass(frozen=True, slots=True)
class Checked:
    """What does not add up in the bookkeeping of an idle engine."""

    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Trouble:
    """A step is stuck, or failed, or a compilation did; where, innermost first: names and lines, no values."""

    event: str
    places: Sequence[str]


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing will be generated any more."""

    reason: str


Event = Stepped | Refused | Checked | Trouble | Ended
Tell = Callable[[Event], None]  # does not block


class Worker(Protocol):
    def send(self, message: Message) -> None:
        """Hand over a message. Does not block, and what has ended takes no notice."""
        ...

    async def compile(self, structure: Structure) -> Any:
        """Return what an Add with this structure needs; `release` it, whether it was added or not.

        Raises: RequestRefused: outputs of this structure cannot be generated. EngineDead.
        """
        ...

    def release(self, compiled: Any) -> None: ...

    def report_stuck(self) -> None:
        """Tell of Trouble: where the step stands."""
        ...

    def join(self, timeout_s: float) -> None:
        """Wait for the end, after Close. Who does not end in time is left behind, or killed where it can be."""
        ...


M = TypeVar("M")


class Mailbox(Generic[M]):
    """Messages on their way to the one who handles them, in order.

    Bounded by who sends: of each request in flight one Add and one Abort, of each salt one Forget, one Close.
    """

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[M] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._to_forget: set[Forget] = set()  # sent and not yet taken

    def put(self, message: M) -> None:
        if isinstance(message, Forget):
            with self._lock:
                if message in self._to_forget:
                    return
                self._to_forget.add(message)
        self._messages.put(message)

    def get(self, timeout_s: float | None = None) -> M | None:
        """Wait for the next; None: `timeout_s` has passed."""
        try:
            return self._taken(self._messages.get(timeout=timeout_s))
        except queue.Empty:
            return None

    def poll(self) -> M | None:
        """Return the next, if there is one."""
        try:
            return self._taken(self._messages.get_nowait())
        except queue.Empty:
            return None

    def _taken(self, message: M) -> M:
        if isinstance(message, Forget):
            with self._lock:
                self._to_forget.discard(message)
        return message
