"""A small real audit log, and a pair of hands that change its SQLite file behind its back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from audit.identifier import uuid7
from audit.leaf import Leaf
from audit.log import AuditLog, LogSettings
from audit.records import (
    ChoiceEntry,
    DecisionEntry,
    GuardrailEntry,
    LimitEntry,
    ModelEntry,
    PrincipalEntry,
    Receipt,
    Record,
    RecordType,
    TimingEntry,
    request_completed,
    request_denied,
    request_failed,
    request_received,
)
from migrations import upgrade

ORIGIN = "probity.test"
ACME, GLOBEX = "acme-bank", "globex-health"
MODEL = ModelEntry("bank-chat", "sha256:7a", "sha256:e3", "sha256:51", "sha256:77", "sha256:0c")
PRINCIPAL = PrincipalEntry("https://id.acme.example", ("app",), "svc-crm", "complaint-summary")
TIMINGS = TimingEntry(10, 200, 3000, 3100, 9000)


class Ledger:
    """One log in one directory: open, write, close, tamper, open again."""

    def __init__(self, directory: Path, database_url: str | None = None, keystore_url: str | None = None) -> None:
        """Make a log in `directory`; a `database_url` given is migrated already."""
        self.settings = LogSettings(
            database_url=database_url or f"sqlite:///{directory}/audit.db",
            keystore_url=keystore_url or f"sqlite:///{directory}/keys.db",
            keys=directory / "keys",
            ratchet=directory / "ratchet",
            trust=directory / "trust.txt",
            origin=ORIGIN,
            low_water_bytes=0,
        )
        self.path = directory / "audit.db"
        if database_url is None:
            upgrade(self.settings.database_url)
        self._requests = 0
        self.log: AuditLog | None = None

    def __enter__(self) -> Ledger:
        self.log = AuditLog.open(self.settings, create=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.log is not None
        self.log.close()
        self.log = None

    def put(self, record: Record) -> Receipt:
        assert self.log is not None
        return self.log.append_blocking(record)

    def note(self, tenant: str, **body: str) -> Receipt:
        """Put a small record that belongs to no request."""
        return self.put(Record(RecordType.ACCESS_CHANGED, tenant, body))

    def receive(self, tenant: str = ACME, **changes: object) -> str:
        """Put a request on record; return its id."""
        self._requests += 1
        request_id = uuid7(1_790_000_000_000 + self._requests, self._requests.to_bytes(10, "big"))
        given: dict[str, object] = {
            "tenant": tenant,
            "request_id": request_id,
            "action": "chat.completions",
            "stream": False,
            "principal": PRINCIPAL,
            "decision": DecisionEntry("allow", ({"code": "rule", "rule": "summaries"},), "sha256:9f"),
            "model": MODEL,
            "sampling": {"seed": "17", "temperature": "0.7"},
            "guardrails": (),
            "limits": (LimitEntry("per-minute", "subject", "tokens_per_minute", 512),),
            "prompt_tokens": 21,
            "identities": {"subject": "mia@acme.example", "source": "10.2.3.4"},
            "prompt": b'{"messages":[{"content":"card 4111 1111 1111 1111"}]}',
            "prompt_to_model": b"card [redacted]",
        }
        self.put(request_received(**{**given, **changes}))  # type: ignore[arg-type]
        return request_id

    def complete(
        self,
        request_id: str,
        tenant: str = ACME,
        status: str = "completed",
        guardrails: tuple[GuardrailEntry, ...] = (),
    ) -> None:
        self.put(
            request_completed(
                tenant=tenant,
                request_id=request_id,
                status=status,
                choices=(ChoiceEntry(0, "stop", 5, "17", "ab" * 32),),
                usage={"prompt_tokens": 21, "cached_tokens": 16, "completion_tokens": 5},
                guardrails=guardrails,
                limits=(LimitEntry("per-minute", "subject", "tokens_per_minute", 512, 26),),
                timings=TIMINGS,
                output=json.dumps(["Here is a summary."]).encode(),
                output_tokens=b"[[1,2,3,4,5]]",
            )
        )

    def ask(self, tenant: str = ACME, **changes: object) -> str:
        """Put a request and its answer on record; return its id."""
        request_id = self.receive(tenant, **changes)
        self.complete(request_id, tenant)
        return request_id

    def fail(self, request_id: str, tenant: str = ACME) -> None:
        self.put(
            request_failed(
                tenant=tenant, request_id=request_id, code="engine_unavailable", timings=TIMINGS, output=b"[]"
            )
        )

    def deny(self, tenant: str = ACME, guardrails: tuple[GuardrailEntry, ...] = ()) -> str:
        self._requests += 1
        request_id = uuid7(1_790_000_000_000 + self._requests, self._requests.to_bytes(10, "big"))
        self.put(
            request_denied(
                tenant=tenant,
                request_id=request_id,
                action="completions",
                principal=PRINCIPAL,
                decision=DecisionEntry("deny", ({"code": "no_rule"},), "sha256:9f"),
                code="policy_denied",
                model_alias="bank-chat",
                guardrails=guardrails,
                identities={"subject": "eve@acme.example"},
                prompt=b'{"prompt":"denied"}',
            )
        )
        return request_id


class Tamper:
    """SQLite's file, opened by someone with every right: triggers dropped, nothing forbidden."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path)
        self.connection.execute("PRAGMA ignore_check_constraints = ON")
        names = self.connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (name,) in names:
            self.connection.execute(f"DROP TRIGGER {name}")

    def __enter__(self) -> Tamper:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.commit()
        self.connection.close()

    def run(self, statement: str, **values: object) -> int:
        return self.connection.execute(statement, values).rowcount

    def one(self, statement: str, **values: object) -> tuple[object, ...]:
        row: tuple[object, ...] = self.connection.execute(statement, values).fetchone()
        return row

    def leaf(self, log: str, index: int) -> Leaf:
        stored = self.one(f"SELECT bytes {_FROM_NUMBERED}", log=log, at=index)[0]
        assert isinstance(stored, bytes)
        return Leaf.parse(stored)

    def rewrite(self, log: str, index: int, columns: Mapping[str, object]) -> None:
        """Set columns of the leaf's row."""
        sets = ", ".join(f"{name} = :{name}" for name in columns)
        changed = self.run(
            f"UPDATE leaf SET {sets} WHERE rowid = (SELECT leaf.rowid {_FROM_NUMBERED})", log=log, at=index, **columns
        )
        assert changed == 1


_FROM_NUMBERED = (
    "FROM leaf JOIN leaf_number USING (log, writer, writer_seq) WHERE leaf_number.log = :log AND leaf_index = :at"
)
