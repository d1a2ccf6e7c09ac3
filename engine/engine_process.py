"""EngineProcess: the worker that is a process of its own, so that its steps and the gateway share no interpreter lock.

    event loop ▶ mailbox ▶ sender thread ──pipe──▶ child.py
    runtime.tell ◀──── receiver thread ◀──pipe──── child.py

An event loop never waits for the child: messages wait in the mailbox, bounded as it says there. The child ends with
this process, however that ends; where the child ends alone, what is in flight fails, by name. torch is not imported
here: a gateway whose engine is a process is as small as one without an engine.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from engine.config import EngineConfig, EngineStartError
from engine.reading import KeptFiles, Progress, silently
from engine.request import EngineDead, Structure
from engine.runtime import EngineRuntime, Report, RuntimeTimes, Served
from engine.tokenizer import Tokenizer
from engine.wire import Compile, Compiled, Progressed, Ready, Release, Where
from engine.worker import Close, Ended, Mailbox, Message, Tell, Trouble

OF_THE_GATEWAY = "PROBITY_"  # begins the names of settings, addresses with passwords among them
END_S = 5.0  # how long a child that has closed its end, or was killed, may take to be gone


def start_engine(config: EngineConfig, report: Report | None = None, progress: Progress = silently) -> EngineRuntime:
    """Load the model in a process of its own, and return an engine that steps there. As `load.load_engine`.

    Raises: EngineStartError and its kinds: nothing was started; the message says what to do.
    """
    process = EngineProcess(config, progress)
    try:
        return EngineRuntime(
            process.begin,
            Tokenizer(process.files),
            process.served,
            report=report,
            times=RuntimeTimes(stuck_after_s=config.stuck_after_s),
        )
    except BaseException:
        process.kill()
        raise


class EngineProcess:
    """`worker.Worker`, from `begin` on."""

    def __init__(self, config: EngineConfig, progress: Progress = silently) -> None:
        """Start the process and wait until it has loaded. Raises: EngineStartError and its kinds."""
        self._messages, self._events, self._process = _spawned()
        self.served: Served
        self.files: KeptFiles
        self._tell: Tell = lambda event: None
        self._mailbox = Mailbox[Message | Compile | Release | Where]()
        self._tickets = itertools.count()
        self._lock = threading.Lock()
        self._compiling: dict[int, Future[None]] | None = {}  # by ticket, under the lock; None once the child has ended
        self._closing = False
        self._sender = threading.Thread(target=self._send_messages, name="probity-engine-sender", daemon=True)
        self._receiver = threading.Thread(target=self._receive_events, name="probity-engine-receiver", daemon=True)
        try:
            with suppress(OSError):  # it has ended already, and what is received will say so
                self._messages.send(config)
            self._await_ready(progress)
        except BaseException:
            self.kill()
            raise

    def _await_ready(self, progress: Progress) -> None:
        while True:
            try:
                told = self._events.recv()
            except (EOFError, OSError):
                code = self._exit_code()
                raise EngineStartError(
                    f"the engine's process ended with {code} while it loaded; what it printed says why"
                ) from None
            if isinstance(told, EngineStartError):
                raise told
            if isinstance(told, Ready):
                self.served, self.files = told.served, told.files
                return
            assert isinstance(told, Progressed)
            progress(told.name, told.done, told.size)

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, tell: Tell) -> EngineProcess:
        """From now on, tell what comes."""
        self._tell = tell
        self._sender.start()
        self._receiver.start()
        return self

    def kill(self) -> None:
        """End the child now, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._messages.close()
        self._events.close()

    # The worker.

    def send(self, message: Message) -> None:
        self._closing = self._closing or isinstance(message, Close)
        self._mailbox.put(message)

    async def compile(self, structure: Structure) -> int:
        """Return a ticket, which stands for what the child has compiled."""
        ticket, compiled = next(self._tickets), Future[None]()
        compiled.set_running_or_notify_cancel()  # who waits for it may give up; it is settled all the same
        with self._lock:
            if self._compiling is None:
                raise EngineDead("the engine failed")
            self._compiling[ticket] = compiled
        self._mailbox.put(Compile(ticket, structure))
        try:
            await asyncio.wrap_future(compiled)
        except BaseException:
            self._forget_compiling(ticket)  # the child may tell no more of it
            self.release(ticket)
            raise
        return ticket

    def release(self, compiled: int) -> None:
        self._mailbox.put(Release(compiled))

    def report_stuck(self) -> None:
        self._tell(Trouble("engine_stuck", [f"process {self.pid}"]))
        self._mailbox.put(Where())  # more, where the child can still say so

    def join(self, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)
        self._receiver.join(END_S)

    # The threads.

    def _send_messages(self) -> None:
        message = None
        while not isinstance(message, Close):
            message = self._mailbox.get()
            try:
                self._messages.send(message)
            except OSError:  # the receiver knows of the end
                return
            except BaseException:  # nobody may be left waiting for what is not sent; the receiver will know of the end
                self._process.kill()
                return

    def _receive_events(self) -> None:
        self._receive_until_the_end()
        self._exit_code()  # buries it
        self._mailbox.put(Close())  # wakes the sender, which may wait for a message
        self._sender.join()
        self._close()

    def _receive_until_the_end(self) -> None:
        ended = None
        while ended is None:
            try:
                event = self._events.recv()
                if isinstance(event, Compiled):
                    self._settle(event)
                elif isinstance(event, Ended):
                    ended = event
                else:
                    self._tell(event)
            except (EOFError, OSError):
                ended = self._unforeseen_end(f"process {self.pid} ended with {self._exit_code()}")
            except BaseException as error:  # whatever it is, nobody may be left waiting for what is not received
                self._process.kill()
                ended = self._unforeseen_end(f"process {self.pid} was killed for {type(error).__name__}")
        self._refuse_compiling()
        self._tell(ended)

    def _unforeseen_end(self, how: str) -> Ended:
        if self._closing:
            return Ended("the engine is closed")
        self._tell(Trouble("engine_failed", [how]))
        return Ended("the engine failed")

    def _forget_compiling(self, ticket: int) -> Future[None] | None:
        with self._lock:
            return None if self._compiling is None else self._compiling.pop(ticket, None)

    def _settle(self, told: Compiled) -> None:
        future = self._forget_compiling(told.ticket)
        if future is None:  # who waited gave up
            return
        if told.refusal is None:
            future.set_result(None)
        else:
            future.set_exception(told.refusal)

    def _refuse_compiling(self) -> None:
        with self._lock:
            compiling, self._compiling = self._compiling or {}, None
        for future in compiling.values():
            future.set_exception(EngineDead("the engine failed"))

    def _exit_code(self) -> int | None:
        """Return how the child ended, after it closed its end; None: it has not."""
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return None


def _spawned() -> tuple[Connection[Any, Any], Connection[Any, Any], subprocess.Popen[bytes]]:
    """Start a child; return what goes to it, what comes from it, and its process.

    It finds the modules that this process finds; secrets and a terminal's signals do not find it. One pair of sockets
    would do for both ways, but whoever waits at one end of it is woken for every message that its own end had sent.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_GATEWAY)}
    its_messages, messages = Pipe(duplex=False)
    events, its_events = Pipe(duplex=False)
    with its_messages, its_events:
        its = its_messages.fileno(), its_events.fileno()
        process = subprocess.Popen(  # noqa: S603 - our own interpreter on our own module
            [sys.executable, "-P", "-m", "engine.child", *map(str, its)],
            pass_fds=its,
            env=environment | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return messages, events, process
