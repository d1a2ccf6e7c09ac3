"""A log to test with: where it lies, its settings, and plain records of a request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, create_engine, event, text

import migrations
from audit.database import reader_engine
from audit.identifier import uuid7
from audit.log import AuditLog, LogSettings
from audit.records import (
    DecisionEntry,
    ModelEntry,
    PrincipalEntry,
    Record,
    Segment,
    TimingEntry,
    request_completed,
    request_denied,
    request_received,
)
from audit.trust import read_trust
from audit.verification import Report, verify
from tests.support.postgres import PostgresDatabase, PostgresServer

ORIGIN = "probity.local"
TENANT = "acme-bank"
MODEL = ModelEntry("bank-chat", *(f"sha256:{digit * 64}" for digit in "12345"))
PRINCIPAL = PrincipalEntry("https://id.acme.example", ["app"], "svc-crm", "complaint-summary")
DECISION = DecisionEntry("allow", [{"code": "rule", "rule": "summaries"}], "sha256:" + "9" * 64)
TIMINGS = TimingEntry(100, 900, 2_000, 2_300, 9_000)


@dataclass(frozen=True, slots=True)
class LogPlace:
    """A directory and a migrated database; `admin_url` bypasses what guards the gateway's own connections."""

    settings: LogSettings
    admin_url: str

    def open(self, **changes: object) -> AuditLog:
        return AuditLog.open(replace(self.settings, **changes), create=True)  # type: ignore[arg-type]

    def verify(self) -> Report:
        """Recompute everything as an auditor would, the ratchet's checkpoints held against it."""
        lines = self.settings.ratchet.read_text().splitlines()[1:]
        engine = reader_engine(self.settings.database_url)
        try:
            return verify(engine, read_trust(self.settings.trust), [json.loads(line)["note"] for line in lines])
        finally:
            engine.dispose()

    def admin(self) -> psycopg.Connection[tuple[object, ...]]:
        """Connect to the server as its superuser, autocommit."""
        return psycopg.connect(self.admin_url.replace("+psycopg", ""), autocommit=True)

    def rows(self, query: str) -> Sequence[tuple[object, ...]]:
        engine = create_engine(self.admin_url)
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(text(query))]
        finally:
            engine.dispose()

    def key_id(self, request: str) -> str:
        """Return the id of the data key that a request's content is sealed with."""
        ((key_id,),) = self.rows(f"SELECT key_id FROM request_index WHERE request_id = '{request}'")
        return str(key_id)


def embedded_place(directory: Path) -> LogPlace:
    url = f"sqlite:///{directory}/audit.db"
    migrations.upgrade(url)
    return LogPlace(log_settings(url, directory), url)


def server_place(directory: Path, database: PostgresDatabase) -> LogPlace:
    return LogPlace(log_settings(database.url, directory), database.admin_url)


def log_settings(url: str, directory: Path) -> LogSettings:
    return LogSettings(
        database_url=url,
        keystore_url=f"sqlite:///{directory}/keys.db",
        keys=directory / "keys",
        ratchet=directory / "ratchet",
        trust=directory / "trust",
        origin=ORIGIN,
        low_water_bytes=0,
    )


def limit_pages(log: AuditLog, pages: int) -> None:
    """Let an embedded log's file have no more pages than this, or than it has, from the next transaction on.

    It is the connection that is limited: the writer's own, which it keeps.
    """

    def limit(connection: Connection) -> None:
        connection.connection.cursor().execute(f"PRAGMA max_page_count={pages}")

    event.listen(log.database.writer, "begin", limit)  # what was said before is said before


def request_id(number: int) -> str:
    return uuid7(1_763_668_980_000 + number, number.to_bytes(10, "big"))


def received(request: str, tenant: str = TENANT, prompt: bytes = b"why was I charged?") -> Record:
    return request_received(
        tenant=tenant,
        request_id=request,
        action="chat.completions",
        stream=True,
        principal=PRINCIPAL,
        decision=DECISION,
        model=MODEL,
        sampling={"max_tokens": 512, "seed": "8817263554", "temperature": "0.7"},
        guardrails=[],
        limits=[],
        prompt_tokens=7,
        identities={"subject": "mia@acme.example", "source": "10.2.3.4"},
        prompt=prompt,
        prompt_to_model=prompt,
    )


def denied(request: str, tenant: str = TENANT) -> Record:
    return request_denied(
        tenant=tenant,
        request_id=request,
        action="chat.completions",
        principal=PRINCIPAL,
        decision=replace(DECISION, effect="deny"),
        code="policy_denied",
        model_alias="bank-chat",
        guardrails=[],
        identities={"subject": "mia@acme.example"},
        prompt=b"why?",
    )


def completed(request: str, tenant: str = TENANT, texts: Sequence[str] = ("because.",)) -> Record:
    return request_completed(
        tenant=tenant,
        request_id=request,
        status="completed",
        choices=[],
        usage={"prompt_tokens": 7, "cached_tokens": 0, "completion_tokens": 3},
        guardrails=[],
        limits=[],
        timings=TIMINGS,
        output=json.dumps(list(texts), ensure_ascii=False, separators=(",", ":")).encode(),
        output_tokens=b"[[1,2,3]]",
    )


def segment(request: str, sequence: int, text: str, tenant: str = TENANT, choice: int = 0) -> Segment:
    return Segment(tenant, request, choice, sequence, text.encode())


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> LogPlace:
    """A log that was never opened, on each database."""
    if request.param == "sqlite":
        return embedded_place(tmp_path)
    server: PostgresServer = request.getfixturevalue("postgres")
    return server_place(tmp_path, server.database())
