"""The whole story of a request, told from its leaves: metadata only, what was said stays sealed.

Told from the evidence itself, never from the officers' index, so that what an officer reads is what a proof is about.
Pure: leaves in, story out. The shape is that of `GET /audit/requests/{id}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audit.leaf import Leaf
from audit.records import CLOSING, Json, RecordType

OPENING = frozenset({RecordType.REQUEST_RECEIVED, RecordType.REQUEST_DENIED})


@dataclass(frozen=True, slots=True)
class StoredLeaf:
    """A leaf and its place."""

    leaf: Leaf
    leaf_hash: str  # 64 hex digits
    leaf_index: int | None  # None while it is not numbered, ≤ 1 s


@dataclass(frozen=True, slots=True)
class RecordEntry:
    type: str
    writer_seq: int
    leaf_index: int | None
    leaf_hash: str


@dataclass(frozen=True, slots=True)
class RequestStory:
    request_id: str
    tenant: str
    subject: str | None  # pseudonym
    client: str | None
    purpose: str | None
    received_at: str  # `2026-11-20T19:43:00.123456Z`
    completed_at: str | None
    status: str  # received | completed | denied | failed | interrupted | cancelled
    decision: Mapping[str, Json]  # effect, reasons, policy
    model: Mapping[str, Json]  # alias; and of a request that was allowed: version, weights, tokenizer, template, engine
    sampling: Mapping[str, Json]  # `seed` among them; empty for a denied one
    usage: Mapping[str, Json]  # prompt_tokens, and once completed cached_tokens and completion_tokens
    guardrails: Sequence[Json]  # of the input, then of the output
    limits: Sequence[Json]  # as settled, or as reserved
    timings: Mapping[str, Json]  # microseconds
    records: Sequence[RecordEntry]


def tell(tenant: str, leaves: Sequence[StoredLeaf]) -> RequestStory:
    """Return the story of one request; `leaves` are all of its leaves, its first is received or denied."""
    first = next(stored.leaf for stored in leaves if stored.leaf.type in OPENING)
    last = next((stored.leaf for stored in leaves if stored.leaf.type in CLOSING), None)
    opened: Any = first.body
    closed: Any = {} if last is None else last.body
    denied = first.type is RecordType.REQUEST_DENIED
    return RequestStory(
        request_id=first.request or "",
        tenant=tenant,
        subject=first.identities.get("subject"),
        client=opened["principal"].get("client"),
        purpose=opened["principal"].get("purpose"),
        received_at=first.time,
        completed_at=first.time if denied else None if last is None else last.time,
        status=_status(denied, last),
        decision=opened["decision"],
        model=opened["model"],
        sampling=opened.get("sampling", {}),
        usage=closed.get("usage") or {key: opened[key] for key in ("prompt_tokens",) if key in opened},
        guardrails=[*opened.get("guardrails", ()), *closed.get("guardrails", ())],
        limits=_limits(opened.get("limits", ()), closed.get("limits", ())),
        timings=closed.get("timings", {}),
        records=[
            RecordEntry(stored.leaf.type.value, stored.leaf.writer_seq, stored.leaf_index, stored.leaf_hash)
            for stored in leaves
        ],
    )


def _status(denied: bool, last: Leaf | None) -> str:
    if denied:
        return "denied"
    if last is None:
        return "received"
    if last.type is RecordType.REQUEST_COMPLETED:
        return str(last.body["status"])  # completed or cancelled
    return last.type.value.removeprefix("request.")


def _limits(reserved: Sequence[Any], settled: Sequence[Any]) -> list[Json]:
    """Return the limits of the request, each as it was settled where it was."""
    by_id = {(entry["id"], entry["scope"]): entry for entry in (*reserved, *settled)}
    return list(by_id.values())
