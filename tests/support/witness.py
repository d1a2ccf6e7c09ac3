"""A witness beside the gateway: it looks into the database file through connections of its own, and opens what it
finds with the keyring. What it does not see there was not committed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audit.content import SealedPart, open_part, open_transient
from audit.journal import TOKENS_BEHIND, part_name
from audit.leaf import Leaf
from audit.records import CLOSING, RecordType
from gateway.state import AppState


class Witness:
    def __init__(self, rooms: AppState, tenant: str) -> None:
        self._log = rooms.log
        self._tenant = tenant
        self._path: Path = rooms.settings.data_dir / "probity.sqlite3"

    def leaves(self, request_id: str) -> list[Leaf]:
        with self._look() as connection:
            return _leaves(connection, request_id)

    def received_prompt(self, request_id: str) -> str | None:
        """Return the prompt for the model of the committed `request.received`, or None."""
        with self._look() as connection:
            found = _leaves(connection, request_id)
            received = [leaf for leaf in found if leaf.type is RecordType.REQUEST_RECEIVED]
            return self._part(connection, received[0], "prompt_to_model").decode() if received else None

    def texts(self, request_id: str) -> dict[int, str]:
        return self.on_record(request_id)[0]

    def on_record(self, request_id: str) -> tuple[dict[int, str], dict[int, list[Told]]]:
        """Return the text of each choice and what is told of its tokens: of the closing record, else of the journal."""
        with self._look() as connection:
            closing = [leaf for leaf in _leaves(connection, request_id) if leaf.type in CLOSING]
            if closing:
                return self._closed(connection, closing[0])
            query = "SELECT sequence, choice, sealed FROM journal WHERE request_id = ? ORDER BY sequence"
            segments = connection.execute(query, (request_id,)).fetchall()
            query = "SELECT key_id FROM request_index WHERE request_id = ?"
            ((key_id,),) = connection.execute(query, (request_id,)).fetchall()
        key = self._data_key(str(key_id))
        texts: dict[int, str] = {}
        tokens: dict[int, list[Told]] = {}
        for sequence, choice, sealed in segments:
            opened = open_transient(key, self._tenant, request_id, part_name(sequence), sealed)
            text, _, behind = opened.partition(TOKENS_BEHIND)
            texts[choice] = texts.get(choice, "") + text.decode()
            tokens.setdefault(choice, []).extend(_told(*one) for one in json.loads(behind or b"[]"))
        return texts, tokens

    def _closed(self, connection: sqlite3.Connection, leaf: Leaf) -> tuple[dict[int, str], dict[int, list[Told]]]:
        whole = dict(enumerate(json.loads(self._part(connection, leaf, "output"))))
        asked = any(part.name == "logprobs" for part in leaf.parts)
        told = json.loads(self._part(connection, leaf, "logprobs"))["choices"] if asked else []
        return whole, {choice: [_told(*one) for one in entries] for choice, entries in enumerate(told)}

    def _part(self, connection: sqlite3.Connection, leaf: Leaf, name: str) -> bytes:
        query = "SELECT key_id, nonce, ciphertext FROM content WHERE record_id = ? AND part = ?"
        ((key_id, nonce, ciphertext),) = connection.execute(query, (leaf.record, name)).fetchall()
        committed = next(part for part in leaf.parts if part.name == name)
        sealed = SealedPart(bytes.fromhex(committed.com), bytes.fromhex(committed.ct), nonce, ciphertext)
        return open_part(self._data_key(key_id), self._tenant, leaf.record, name, sealed).plaintext

    def _data_key(self, key_id: str) -> bytes:
        return self._log.keyring.encryption.unwrap(self._tenant, self._log.keystore.get(key_id).wrapped)

    @contextmanager
    def _look(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection on which all queries see one moment."""
        connection = sqlite3.connect(self._path, isolation_level=None)
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            connection.close()


def _leaves(connection: sqlite3.Connection, request_id: str) -> list[Leaf]:
    query = "SELECT bytes FROM leaf WHERE request_id = ? ORDER BY writer_seq"
    return [Leaf.parse(row[0]) for row in connection.execute(query, (request_id,)).fetchall()]


Told = tuple[bytes, float, tuple[tuple[bytes, float], ...]]  # a scripted token is a byte


def _told(token: int, logprob: float, top: Sequence[tuple[int, float]]) -> Told:
    return bytes([token]), logprob, tuple((bytes([one]), value) for one, value in top)


class Guarded:
    """Stands between the server and the app: before a body chunk goes on, all text up to its end must be on record.

    Tokens shown by log-probabilities count as text, and what is told of them, the likeliest others among it, must be on
    record too. What leaves too early is named in `breaches`.
    """

    def __init__(self, app: FastAPI, inner: ASGIApp, tenant: str) -> None:
        self._inner = inner
        self._witness = Witness(app.state.probity, tenant)
        self.breaches: list[str] = []
        self.chunks = 0  # that carried text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent: dict[int, str] = {}
        shown: dict[int, list[Told]] = {}
        request_id = ""

        async def watched(message: Message) -> None:
            nonlocal request_id
            if message["type"] == "http.response.start":
                request_id = dict(message["headers"])[b"x-request-id"].decode()
            elif message["type"] == "http.response.body" and message.get("body"):
                for choice, text, tokens in _texts(message["body"]):
                    sent[choice] = sent.get(choice, "") + text
                    shown.setdefault(choice, []).extend(tokens)
                self._check(request_id, sent, shown)
            await send(message)

        await self._inner(scope, receive, watched if scope["type"] == "http" else send)

    def _check(self, request_id: str, sent: dict[int, str], shown: dict[int, list[Told]]) -> None:
        if not any(sent.values()) and not any(shown.values()):
            return
        self.chunks += 1
        on_record, told = self._witness.on_record(request_id)
        for choice, text in sent.items():
            if not on_record.get(choice, "").startswith(text):
                self.breaches.append(f"text of choice {choice} of {request_id} is not on record")
        for choice, tokens in shown.items():
            if not on_record.get(choice, "").encode().startswith(b"".join(token for token, _, _ in tokens)):
                self.breaches.append(f"tokens of choice {choice} of {request_id} are not on record")
            if told.get(choice, [])[: len(tokens)] != tokens:
                self.breaches.append(f"what is told of tokens of choice {choice} of {request_id} is not on record")


def _texts(body: bytes) -> list[tuple[int, str, list[Told]]]:
    """Return (choice, text, its tokens' log-probabilities) of everything in a body chunk."""
    if body.startswith(b"{"):
        return _of(orjson.loads(body))
    found = []
    for line in body.split(b"\n\n"):
        data = line.removeprefix(b"data: ")
        if data and data != b"[DONE]":
            found += _of(orjson.loads(data))
    return found


def _of(answer: dict[str, object]) -> list[tuple[int, str, list[Told]]]:
    found = []
    choices = answer.get("choices") or []
    assert isinstance(choices, list)
    for choice in choices:
        said = choice.get("delta") or choice.get("message") or choice
        text = said.get("content") or said.get("text") or ""
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        found.append((choice["index"], text, [_shown(entry) for entry in logprobs]))
    return found


def _shown(entry: dict[str, Any]) -> Told:
    top = tuple((bytes(one["bytes"]), one["logprob"]) for one in entry["top_logprobs"])
    return bytes(entry["bytes"]), entry["logprob"], top
