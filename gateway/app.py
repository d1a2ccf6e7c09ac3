"""The composition root: settings in, a governed gateway out. The only place where the rooms are opened and joined.

`create_app` opens everything before it returns: a start-up that cannot keep a promise raises, and no port is bound.
Requests walk the middlewares from the outside in:

    Containment → RequestIdentification → Authentication → Admission → ShortWay → routes
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from types import FrameType

import httpx
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Connection
from starlette.types import ASGIApp

import migrations
from audit.activation import last_activation
from audit.content import RandomPages
from audit.identifier import NOISE_BYTES, uuid7
from audit.log import AuditLog, LogSettings, OnDeath
from audit.reader import AuditReader
from audit.records import SYSTEM, Record, RecordType
from engine.request import Engine, ModelVersion
from gateway.admission import Admission
from gateway.auth.authentication import Authentication
from gateway.auth.permissions import Permission, RoutePermission, public_paths, route_permissions
from gateway.auth.trust import key_client, trusted_verifier
from gateway.bodies import Bodies
from gateway.bounded_http import bounded_http
from gateway.error_responses import (
    Containment,
    install_error_handlers,
    note_failure,
    report_engine_trouble,
    report_model_reading,
)
from gateway.identification import RequestIdentification
from gateway.log_death import end_process
from gateway.open_files import make_room
from gateway.pipeline import Clock, Pipeline
from gateway.refusals import Refusals
from gateway.release import PACES
from gateway.routes import admin, audit, health, inference, models, policy, receipts
from gateway.settings import Settings
from gateway.short_way import ShortWay
from gateway.standings import Standings
from gateway.state import AppState
from gateway.telemetry import Telemetry
from policies.document import FLOOR_TENANT
from policies.follower import Follower
from policies.limits import DAY_S, Holder, LimitLedger, PastUse
from policies.store import PolicyStore

# Between the beginnings of a busy log's batches: every commit takes time from the engine's steps, on two processors.
# Beside a bare engine, 32 streams had 0.92 to 0.97 of its throughput without, and 1.0 with; a piece waits for the next
# anyway (release.py).
LOG_RHYTHM_S = 0.003
LAST_RECORDS_S = 5.0  # for closing records, after the engine was closed
COLLECT_EVERY = 10_000  # objects made and not yet gone
CLOCK = Clock(now=lambda: datetime.now(UTC), monotonic=time.monotonic)


def create_app(
    settings: Settings, *, engine: Engine | None = None, clock: Clock = CLOCK, on_log_death: OnDeath = end_process
) -> FastAPI:
    """Open the rooms and return the gateway.

    Without `engine`, the model of the settings is loaded. `on_log_death` is told once, on the log's own thread, that
    nothing can be put on record any more.

    Raises: what a room raises that cannot keep its promise; `START_REFUSALS` in start_refusal.py lists it.
    """
    make_room(settings.server.max_connections)  # first: a refusal then leaves nothing behind, and no model was awaited
    with ExitStack() as opened:
        log = open_log(settings, on_log_death)
        opened.callback(log.close)
        if engine is None:
            engine = load_model(settings)
            opened.callback(engine.close)
        for version in engine.versions.values():
            log.append_blocking(_model_loaded(version, engine.numeric_policy))
        state = _join(settings, log, engine, clock)
        opened.pop_all()  # theirs who serve, from here on
    app = FastAPI(title="Probity", version="2026.11.0", lifespan=_lifespan, openapi_url=None)
    app.state.probity = state
    app.state.key_client = key_client()
    for routes in (inference, models, policy, receipts, health, audit, admin):
        app.include_router(routes.router)
    install_error_handlers(app)
    return app


def open_log(settings: Settings, on_death: OnDeath) -> AuditLog:
    """Open the log of the settings; an embedded one is made, and brought up to date, on the way."""
    embedded = settings.database.url is None
    if embedded:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        migrations.upgrade(settings.database_url)
    return AuditLog.open(
        LogSettings(
            database_url=settings.database_url,
            keystore_url=settings.keystore_url,
            keys=settings.data_dir / "keys",
            ratchet=settings.data_dir / "ratchet",
            trust=settings.data_dir / "trust",
            origin=settings.audit.origin_prefix,
            append_timeout_s=settings.audit.append_timeout_s,
            low_water_bytes=settings.audit.low_water_mib << 20,
            lease_s=settings.audit.lease_s,
            rhythm_s=LOG_RHYTHM_S,
        ),
        create=True,
        on_death=on_death,
    )


def load_model(settings: Settings) -> Engine:
    """Load the model of the settings. torch is imported here and not before: a gateway can do without."""
    from engine.config import EngineConfig
    from gateway.demo import model_directory

    chosen = settings.engine
    if chosen.runs_in == "process":
        from engine.engine_process import start_engine as load_engine
    else:
        from engine.load import load_engine
    return load_engine(
        EngineConfig(
            model=settings.model.path or model_directory(),
            device=chosen.device,
            threads=chosen.threads,
            compiled=chosen.kernels == "compiled",
            kv_cache_mib=chosen.kv_cache_mib,
            kv_cache_dtype=chosen.kv_cache_dtype,
            max_sequences=chosen.max_sequences,
            max_tokens_per_step=chosen.max_tokens_per_step,
            max_waiting=chosen.max_waiting,
            max_per_key=chosen.max_per_tenant,
            adapters=settings.model.adapter_directories,
        ),
        report=report_engine_trouble,
        progress=report_model_reading,
    )


def _join(settings: Settings, log: AuditLog, engine: Engine, clock: Clock) -> AppState:
    telemetry = Telemetry(settings.telemetry, engine.model.name)
    ledger = LimitLedger(clock.monotonic)
    policies = PolicyStore(log.database.watcher, on_record=partial(_activated, log))
    standings = Standings(policies, settings.limits.max_governed)
    reader = AuditReader(log.database.reader, log.keyring, log.keystore)
    _restore_limits(ledger, reader, clock)
    return AppState(
        settings=settings,
        started=clock.now(),
        clock=clock,
        log=log,
        reader=reader,
        policies=policies,
        standings=standings,
        ledger=ledger,
        engine=engine,
        pipeline=Pipeline(
            engine,
            standings,
            ledger,
            log,
            telemetry,
            clock,
            RandomPages(),
            weight=settings.engine.weight,
            pace=PACES[settings.engine.runs_in],
            max_governed=settings.limits.max_governed,
            max_of_tenant=settings.limits.max_governed_per_tenant,
        ),
        telemetry=telemetry,
        refusals=Refusals(log),
    )


def _activated(log: AuditLog, connection: Connection, tenant: str) -> tuple[int, str] | None:
    """Return what the log says was activated last for a tenant, or of the floor."""
    origin = log.origin(SYSTEM if tenant == FLOOR_TENANT else tenant)
    found = last_activation(connection, origin, tenant)
    return None if found is None else (found.version, found.digest)


def _restore_limits(ledger: LimitLedger, reader: AuditReader, clock: Clock) -> None:
    """Rebuild what counts against limits from the log: a restart forgives nothing."""
    wall, monotonic = clock.now().timestamp(), clock.monotonic()
    uses = reader.uses_since(round((wall - DAY_S) * 1e6))
    ledger.restore(
        PastUse(monotonic - (wall - use.received_at / 1e6), Holder(use.tenant, use.subject), use.tokens) for use in uses
    )


def _model_loaded(model: ModelVersion, numeric_policy: str) -> Record:
    adapter = model.adapter
    return Record(
        RecordType.MODEL_LOADED,
        SYSTEM,
        {
            "name": model.name,
            "version": model.digest,
            "weights": model.weights,
            "config": model.config,
            "tokenizer": model.tokenizer,
            "template": model.template,
            "cast": list(model.cast),
            "engine": numeric_policy,
            **({} if adapter is None else {"adapter": {"name": adapter.name, "digest": adapter.digest}}),
        },
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Serve, then end in order: no new requests, those in flight to their closing records, engine, log."""
    state: AppState = app.state.probity
    follower = _follower(state, asyncio.get_running_loop())
    await asyncio.to_thread(follower.start)
    yield
    await state.pipeline.drain(state.settings.server.drain_timeout_s)
    state.engine.close()
    await state.pipeline.drain(LAST_RECORDS_S)  # what the closed engine failed is put on record before the log closes
    await asyncio.to_thread(follower.close)
    state.log.close()
    state.telemetry.close()
    await app.state.key_client.aclose()


def _follower(state: AppState, loop: asyncio.AbstractEventLoop) -> Follower:
    """Return what makes a change at another gateway hold here: streams of a tenant suspended there end here too."""
    chosen = state.settings.policies
    return Follower(
        state.policies,
        every_s=chosen.refresh_s,
        patience_s=chosen.patience_s,
        on_suspended=lambda tenant: _tell(loop, state.pipeline.forget_cache, tenant),
        on_trouble=lambda error: note_failure("policies_not_refreshed", error),
    )


def _tell(loop: asyncio.AbstractEventLoop, act: Callable[[str], None], tenant: str) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it what it would be told
        loop.call_soon_threadsafe(act, tenant)


def secured(app: FastAPI, client: httpx.AsyncClient) -> ASGIApp:
    """Return the app behind its middlewares. `client` fetches issuers' keys."""
    state: AppState = app.state.probity
    settings = state.settings
    actions = {route.path: inference.action_of(route.path) for route in route_permissions(app) if _asks(route)}
    admitted = Admission(
        ShortWay(app, inference.handlers()),
        settings.server.max_body_bytes,
        settings.server.max_header_bytes,
        bodies=Bodies(settings.server.max_bodies_mib << 20),
        on_record=lambda refused, scope: state.refusals.head(refused, actions.get(scope["path"]), scope),
    )
    authenticated = Authentication(
        admitted,
        trusted_verifier(settings, client, lambda: state.clock.now().timestamp(), state.clock.monotonic),
        public_paths(app),
        on_refusal=state.telemetry.gateway.count_refusal,
    )
    random = RandomPages()  # asked for by the loop alone, as the pipeline asks its own
    return Containment(
        RequestIdentification(authenticated, lambda: uuid7(int(time.time() * 1000), random(NOISE_BYTES)))
    )


def _asks(route: RoutePermission) -> bool:
    return route.permission is Permission.INFER and "POST" in route.methods


class Server(uvicorn.Server):
    """SIGTERM drains: from that moment new questions are answered 503 `draining`, on open connections too."""

    def __init__(self, config: uvicorn.Config, pipeline: Pipeline) -> None:
        super().__init__(config)
        self._pipeline = pipeline

    def run_alone(self) -> None:
        """Run, as all that this process is for. What the start made stays to the end: the collector, which would look
        through all of it again and again (a tenth of a busy gateway's time, and pauses of 100 ms), leaves it alone.
        Of what requests make, nearly all goes without a collector: it looks less often."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_EVERY)
        self.run()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._pipeline.stop_taking()
        super().handle_exit(sig, frame)


def server(app: FastAPI) -> Server:
    """Return the server of an app, not yet running."""
    state: AppState = app.state.probity
    settings = state.settings.server
    config = uvicorn.Config(
        secured(app, app.state.key_client),
        host=settings.host,
        port=settings.port,
        http=bounded_http(settings.head_timeout_s, settings.body_timeout_s, settings.max_connections),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        # Said here in full: the server's own default believes every process of this machine, and the environment.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_graceful_shutdown=int(settings.drain_timeout_s) + 1,
    )
    return Server(config, state.pipeline)
