"""A gateway that runs in this process on loopback: the real app behind its real middlewares and server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fastapi import FastAPI
from starlette.types import ASGIApp

from engine.request import Engine
from gateway.app import create_app, server
from gateway.settings import load_settings
from gateway.state import AppState
from tests.support.server import free_port
from tests.support.tenant import activate_policy, credential, policy_text


@dataclass(frozen=True, slots=True)
class RunningGateway:
    app: FastAPI
    url: str

    @property
    def rooms(self) -> AppState:
        rooms: AppState = self.app.state.probity
        return rooms

    def credential(self, *roles: str, **claims: str) -> str:
        return credential(self.app, *roles, **claims)


@contextmanager
def running_gateway(
    data: Path,
    engine: Engine,
    *,
    obligations: str = "",
    sections: str = "",
    around: Callable[[FastAPI, ASGIApp], ASGIApp] | None = None,  # what stands between the server and the app
    on_log_death: Callable[[str], None] = lambda why: None,  # this process is the tests', and does not end with the log
    **overrides: object,
) -> Iterator[RunningGateway]:
    """Serve until the block ends; then drain and close as SIGTERM would."""
    port = free_port()
    paths = {"data_dir": str(data), "server.port": port, "audit.low_water_mib": 1}
    settings = load_settings(
        None, {}, {**paths, **{name.replace("__", "."): value for name, value in overrides.items()}}
    )
    app = create_app(settings, engine=engine, on_log_death=on_log_death)
    activate_policy(app, policy_text(engine.model.digest, obligations=obligations, sections=sections))
    running = server(app)
    if around is not None:
        running.config.app = around(app, cast(ASGIApp, running.config.app))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        if not thread.is_alive():
            raise AssertionError("the gateway did not start")
        time.sleep(0.01)
    try:
        yield RunningGateway(app, f"http://127.0.0.1:{port}")
    finally:
        running.should_exit = True
        thread.join(timeout=30)
