"""The officers' view: what a request's leaves say, as one row of `request_index`.

Mutable and rebuildable: every column comes from a leaf. The writer keeps it in the leaf's own transaction, so the view
is never behind the evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Dialect

from audit.leaf import Leaf
from audit.records import RecordType
from audit.tables import ROWS_A_STATEMENT, batched, execute, placeholders

FOUND = frozenset({"flagged", "redacted", "blocked", "error"})  # verdicts by which officers look for a guardrail


def opening_row(leaf: Leaf, tenant: str, key_id: str, time_us: int) -> dict[str, Any]:
    """Return the row of a request whose first leaf, received or denied, is `leaf`."""
    body: Any = leaf.body
    denied = leaf.type is RecordType.REQUEST_DENIED
    reserved = max((entry["reserved"] for entry in body.get("limits", ())), default=None)
    return {
        "request_id": leaf.request,
        "log": leaf.log,
        "tenant": tenant,
        "writer": leaf.writer,
        "key_id": key_id,
        "subject": leaf.identities.get("subject"),
        "client": body["principal"].get("client"),
        "purpose": body["principal"].get("purpose"),
        "action": body["action"],
        "model_alias": body["model"].get("alias"),
        "model_version": body["model"].get("version"),
        "effect": body["decision"]["effect"],
        "policy": body["decision"]["policy"],
        "status": "denied" if denied else "received",
        "code": body.get("code"),
        "guardrails": found(body),
        "received_at": time_us,
        "completed_at": time_us if denied else None,
        "prompt_tokens": body.get("prompt_tokens"),
        "completion_tokens": None,
        "reserved_tokens": reserved,
    }


def closing_values(leaf: Leaf, time_us: int) -> dict[str, Any]:
    """Return what a closing leaf changes in the row. `more_guardrails` is to be appended to `guardrails`."""
    body: Any = leaf.body
    status = {
        RecordType.REQUEST_COMPLETED: body.get("status"),
        RecordType.REQUEST_FAILED: "failed",
        RecordType.REQUEST_INTERRUPTED: "interrupted",
    }[leaf.type]
    return {
        "at_request": leaf.request,
        "status": status,
        "code": body.get("code"),
        "completed_at": time_us,
        "completion_tokens": body.get("usage", {}).get("completion_tokens"),
        "more_guardrails": found(body).removeprefix("|"),
    }


_CLOSING = ("at_request", "status", "code", "completed_at", "completion_tokens", "more_guardrails")


def close_rows(connection: Connection, closings: Sequence[dict[str, Any]]) -> None:
    """Change the rows of requests that ended, each as `closing_values` says."""
    for some in batched(closings):
        values = tuple(row[name] for row in some for name in _CLOSING)
        execute(connection, _close(len(some), connection.dialect), values)


@lru_cache(maxsize=ROWS_A_STATEMENT)
def _close(rows: int, dialect: Dialect) -> str:
    # PostgreSQL takes a column of NULLs for text: the numbers are cast.
    return f"""
        WITH closing ({", ".join(_CLOSING)}) AS (VALUES {placeholders(rows, len(_CLOSING), dialect)})
        UPDATE request_index SET
            status = closing.status,
            code = closing.code,
            completed_at = CAST(closing.completed_at AS BIGINT),
            completion_tokens = CAST(closing.completion_tokens AS BIGINT),
            guardrails = request_index.guardrails || closing.more_guardrails
        FROM closing WHERE request_index.request_id = closing.at_request
    """  # noqa: S608


def found(body: Mapping[str, Any]) -> str:
    """Return the ids of the guardrails that found something, `|pii-in|secrets-in|`, or nothing."""
    ids = sorted({entry["id"] for entry in body.get("guardrails", ()) if entry["verdict"] in FOUND})
    return f"|{'|'.join(ids)}|" if ids else ""
