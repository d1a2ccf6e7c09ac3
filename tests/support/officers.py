"""Hands for tests of the officers' API: who asks, what is asked, and what the log then holds."""

from __future__ import annotations

import json
import sqlite3
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from audit.content import SealedPart, open_part
from audit.leaf import Leaf
from tests.support.gateway import RunningGateway
from tests.support.tenant import MODEL, TENANT

WINDOW = {"from": "2026-01-01T00:00:00Z", "to": "2035-01-01T00:00:00Z"}


class Hand:
    """Someone with a credential and an HTTP client."""

    def __init__(self, gateway: RunningGateway, *roles: str, **claims: str) -> None:
        self.subject = claims.get("subject", "mia@test.example")
        bearer = {"authorization": f"Bearer {gateway.credential(*roles, **claims)}"}
        self.http = httpx.Client(base_url=gateway.url, headers=bearer, trust_env=False, timeout=30)
        weakref.finalize(self, self.http.close)

    def get(self, path: str, **params: Any) -> httpx.Response:
        return self.http.get(path, params=params or None)

    def post(self, path: str, body: Any, etag: str | None = None) -> httpx.Response:
        return self.http.post(path, json=body, headers={} if etag is None else {"if-match": etag})

    def ask(self, text: str, **more: Any) -> str:
        """Ask the model; return the request id, whatever the answer."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
        return self.http.post("/v1/chat/completions", json=body).headers["x-request-id"]


def leaves(gateway: RunningGateway, tenant: str = TENANT, type: str | None = None) -> list[Leaf]:
    """Return the leaves of a tenant's log, or those of one type, in the order they were written."""
    connection = sqlite3.connect(_database(gateway))
    try:
        rows = connection.execute("SELECT bytes FROM leaf ORDER BY time, record_id").fetchall()
    finally:
        connection.close()
    parsed = [Leaf.parse(row[0]) for row in rows]
    origin = gateway.rooms.log.origin(tenant)
    return [leaf for leaf in parsed if leaf.log == origin and type in (None, leaf.type.value)]


def part(gateway: RunningGateway, leaf: Leaf, name: str, tenant: str = TENANT) -> bytes:
    """Return a content part of a leaf, opened."""
    connection = sqlite3.connect(_database(gateway))
    try:
        query = "SELECT key_id, nonce, ciphertext FROM content WHERE record_id = ? AND part = ?"
        key_id, nonce, ciphertext = connection.execute(query, (leaf.record, name)).fetchone()
    finally:
        connection.close()
    committed = next(commitment for commitment in leaf.parts if commitment.name == name)
    sealed = SealedPart(bytes.fromhex(committed.com), bytes.fromhex(committed.ct), nonce, ciphertext)
    log = gateway.rooms.log
    data_key = log.keyring.encryption.unwrap(tenant, log.keystore.get(key_id).wrapped)
    return open_part(data_key, tenant, leaf.record, name, sealed).plaintext


def identities(gateway: RunningGateway, leaf: Leaf, tenant: str = TENANT) -> Mapping[str, str]:
    opened: Mapping[str, str] = json.loads(part(gateway, leaf, "identities", tenant))
    return opened


@contextmanager
def database_locked(gateway: RunningGateway) -> Iterator[None]:
    """Hold the database's write lock: nothing can be put on record, everything can be read."""
    connection = sqlite3.connect(_database(gateway), isolation_level=None, timeout=30)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def _database(gateway: RunningGateway) -> Path:
    return gateway.rooms.settings.data_dir / "probity.sqlite3"
