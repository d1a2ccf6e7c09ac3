"""The engine's process: loads, then hands messages to a StepThread and its events back. Started by engine_process.py.

    python -m engine.child FD FD    pipes whose other ends the gateway holds: from it, and to it

It ends when the gateway closes it, or is gone; never by a signal of the terminal or of the service manager, who mean
the gateway, which lets answers come to their end first.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from engine.config import EngineConfig, EngineStartError
from engine.grammar import Start
from engine.load import LoadedEngine, load
from engine.request import RequestRefused
from engine.runtime import COMPILED_AT_ONCE
from engine.step_thread import StepThread
from engine.wire import Compile, Compiled, Progressed, Ready, Release, Where
from engine.worker import Add, Ended


class Child:
    def __init__(self, messages: Connection[Any, Any], events: Connection[Any, Any]) -> None:
        self._messages = messages
        self._events = events
        self._sending = threading.Lock()  # the step, the compilers and the receiver all tell
        self._loading = True
        # By ticket, until it is released; None: still to be compiled. As many as the gateway has structured requests.
        self._starts: dict[int, Start | None] = {}
        self._lock = threading.Lock()  # of them

    def run(self) -> None:
        """Load, serve, and end the process."""
        config = self._messages.recv()
        threading.Thread(target=self._end_if_orphaned, daemon=True).start()
        loaded = self._load(config)
        if loaded is None:
            return
        gc.collect()
        gc.freeze()  # what was loaded stays; looking through it again and again would hold up steps
        self._loading = False
        self._tell(Ready(loaded.served, loaded.files))
        step_thread = StepThread(loaded.core, self._tell, grammars=loaded.grammars)
        with ThreadPoolExecutor(COMPILED_AT_ONCE) as compilers:
            while True:
                try:
                    message = self._messages.recv()
                except (EOFError, OSError):
                    os._exit(0)  # nobody is left to generate for
                self._handle(message, step_thread, compilers)

    def _load(self, config: EngineConfig) -> LoadedEngine | None:
        try:
            return load(config, lambda *progress: self._tell(Progressed(*progress)))
        except EngineStartError as refusal:
            self._tell(refusal)
            return None

    def _handle(self, message: Any, step_thread: StepThread, compilers: ThreadPoolExecutor) -> None:
        if isinstance(message, Compile):
            with self._lock:
                self._starts[message.ticket] = None
            compilers.submit(self._compile, message, step_thread)
        elif isinstance(message, Release):
            with self._lock:
                self._starts.pop(message.ticket, None)
        elif isinstance(message, Where):
            step_thread.report_stuck()
        elif isinstance(message, Add) and message.compiled is not None:
            with self._lock:
                start = self._starts.get(message.compiled)
            step_thread.send(replace(message, compiled=start))
        else:
            step_thread.send(message)

    def _compile(self, message: Compile, step_thread: StepThread) -> None:
        with self._lock:
            if message.ticket not in self._starts:  # nobody waits for it any more
                return
        try:
            start = step_thread.compile_now(message.structure)
        except RequestRefused as refusal:
            self._tell(Compiled(message.ticket, refusal))
        else:
            with self._lock:
                if message.ticket in self._starts:
                    self._starts[message.ticket] = start
            self._tell(Compiled(message.ticket, None))

    def _tell(self, event: object) -> None:
        try:
            with self._sending:
                self._events.send(event)
        except OSError:
            os._exit(1)  # nobody listens any more
        if isinstance(event, Ended):
            os._exit(0)

    def _end_if_orphaned(self) -> None:
        """While it loads, the gateway says nothing: what can be read then is its end."""
        self._messages.poll(None)
        if self._loading:
            os._exit(1)


def main() -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    messages, events = map(int, sys.argv[1:])
    Child(Connection(messages, writable=False), Connection(events, readable=False)).run()


if __name__ == "__main__":
    main()
