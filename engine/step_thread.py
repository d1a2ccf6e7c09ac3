"""StepThread: the worker that is a thread of this process. Nobody else touches the core.

    mailbox ▶ core.add / abort / reset_cache ▶ core.step ▶ tell, once a step

While a step is under way its scheduler is let know who has come; everything else waits for its end.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections import deque
from pathlib import Path

from engine.core import EngineCore
from engine.grammar import PARAM, Grammars, Start
from engine.request import EngineError, RequestRefused, Structure
from engine.worker import Abort, Add, Checked, Close, Ended, Forget, Mailbox, Message, Refused, Stepped, Tell, Trouble

IDLE_CHECK_S = 5.0  # idle time after which the bookkeeping is checked, once
MAX_FRAMES = 12  # of a stack that is told


class StepThread:
    """`worker.Worker`. `tell` is called from this thread, but of a step that is stuck and of a compilation that failed,
    which are told where they are asked for."""

    def __init__(
        self,
        core: EngineCore,
        tell: Tell,
        *,
        grammars: Grammars | None = None,  # none: structures are refused
        idle_check_s: float = IDLE_CHECK_S,  # > 0
    ) -> None:
        self._core = core
        self._tell = tell
        self._grammars = grammars
        self._idle_check_s = idle_check_s
        self._mailbox = Mailbox[Message]()
        self._set_aside: deque[Message] = deque()  # taken in during a step; bounded as the mailbox is
        self._thread = threading.Thread(target=self._work, name="probity-engine", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        self._mailbox.put(message)

    async def compile(self, structure: Structure) -> Start:
        return await asyncio.to_thread(self.compile_now, structure)

    def compile_now(self, structure: Structure) -> Start:
        """As `compile`; takes milliseconds. Safe from any thread. Raises: RequestRefused."""
        if self._grammars is None:
            raise RequestRefused("this engine knows no structured output; install `llguidance`", PARAM)
        try:
            return self._grammars.compile(structure)
        except RequestRefused:
            raise
        except BaseException as error:  # a compiler's panic, too; its message may quote the structure
            self._trouble("compile_failed", error)
            raise RequestRefused("the structure cannot be compiled; write it in another way", PARAM) from None

    def release(self, compiled: Start) -> None:
        """Nothing is kept for it here."""

    def report_stuck(self) -> None:
        frame = sys._current_frames().get(self._thread.ident or 0)
        self._tell(Trouble("engine_stuck", places(traceback.extract_stack(frame)) if frame is not None else []))

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _trouble(self, event: str, error: BaseException) -> None:
        """Tell what kind of error it was, and where. Its message may hold content; its place does not."""
        self._tell(Trouble(event, [type(error).__name__, *places(traceback.extract_tb(error.__traceback__))]))

    # The thread.

    def _work(self) -> None:
        try:
            while self._receive():
                emissions = self._core.step(self._take_in)
                self._tell(Stepped(emissions, self._core.metrics()))
        except BaseException as error:
            # Whatever it is, nobody may be left waiting for it.
            self._trouble("engine_failed", error)
            self._tell(Ended("the engine failed"))
        else:
            self._tell(Ended("the engine is closed"))

    def _receive(self) -> bool:
        """Handle every message there is, waiting for one if there is no work; return whether to go on."""
        message = self._set_aside.popleft() if self._set_aside else self._first_message()
        while message is not None:
            if isinstance(message, Close):
                return False
            self._handle(message)
            message = self._set_aside.popleft() if self._set_aside else self._mailbox.poll()
        return True

    def _first_message(self) -> Message | None:
        if self._core.has_work:
            return self._mailbox.poll()
        message = self._mailbox.get(self._idle_check_s)
        if message is None:
            self._tell(Checked(self._core.check_integrity()))
            message = self._mailbox.get()
        return message

    def _take_in(self) -> None:
        message = self._mailbox.poll()
        while message is not None:
            # An id may come again while the abort of the one before, which had ended by itself, is set aside.
            if isinstance(message, Add) and Abort(message.request.request_id) not in self._set_aside:
                self._handle(message)
            else:
                self._set_aside.append(message)
            message = self._mailbox.poll()

    def _handle(self, message: Add | Abort | Forget) -> None:
        if isinstance(message, Abort):
            emission = self._core.abort(message.request_id)
            if emission is not None:
                self._tell(Stepped([emission], self._core.metrics()))
        elif isinstance(message, Forget):
            self._core.reset_cache(message.cache_salt)
            self._tell(Stepped([], self._core.metrics()))
        else:
            try:
                self._core.add(message.request, message.compiled)
            except EngineError as refusal:
                self._tell(Refused(message.request.request_id, refusal))


def places(frames: traceback.StackSummary) -> list[str]:
    """Return where frames stand, innermost first: names and lines, no values."""
    return [f"{Path(frame.filename).name}:{frame.lineno}:{frame.name}" for frame in reversed(frames[-MAX_FRAMES:])]
