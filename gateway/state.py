"""What one process holds: the rooms, opened once by app.py and reached by routes through the request."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from starlette.requests import Request

from audit.log import AuditLog
from audit.reader import AuditReader
from engine.request import Engine
from gateway.bounded_reads import BoundedReads
from gateway.pipeline import Clock, Pipeline
from gateway.refusals import Refusals
from gateway.settings import Settings
from gateway.standings import Standings
from gateway.telemetry import Telemetry
from policies.limits import LimitLedger
from policies.store import PolicyStore


@dataclass(frozen=True, slots=True)
class AppState:
    settings: Settings
    started: datetime  # UTC
    clock: Clock
    log: AuditLog
    reader: AuditReader
    policies: PolicyStore
    standings: Standings  # the same, for the event loop
    ledger: LimitLedger
    engine: Engine
    pipeline: Pipeline
    telemetry: Telemetry
    refusals: Refusals
    reads: BoundedReads = field(default_factory=BoundedReads)  # what officers read, beside the event loop


def state_of(request: Request) -> AppState:
    state = request.app.state.probity
    assert isinstance(state, AppState)
    return state
