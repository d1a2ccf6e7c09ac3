"""`GET /v1/receipts/{request_id}`: an application holds the gateway to its receipts.

The answer is what an outsider needs to check, without trusting this server: the leaf hash and index of each record of
the request, its inclusion proof, and the signed checkpoint the proof leads to. Numbering follows an append by at most
a second; until then `leaf_index` and `inclusion` are null.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.exc import SQLAlchemyError

from audit.keys import Keyring
from audit.reader import AuditReader, EvidenceDamaged, NotFound, NotSignedYet, NumberedReceipt
from gateway import errors, problems
from gateway.auth.permissions import Permission, requires
from gateway.state import state_of
from policies.request import Principal

router = APIRouter(prefix="/v1/receipts")


@router.get("/{request_id}", dependencies=[requires(Permission.READ_OWN_RECEIPTS)])
async def get_receipt(request: Request, request_id: str) -> dict[str, Any]:
    state = state_of(request)
    asked = (state.reader, state.log.keyring, request.state.principal, request_id)
    try:
        return await state.reads.run(_receipts, *asked)
    except EvidenceDamaged:
        raise problems.evidence_damaged() from None
    except SQLAlchemyError:
        raise errors.audit_unavailable() from None


def _receipts(reader: AuditReader, keyring: Keyring, principal: Principal, request_id: str) -> dict[str, Any]:
    """Return the receipts of the caller's own request; anybody else's does not exist for them."""
    try:
        story = reader.story(request_id)
    except NotFound:
        raise errors.not_found() from None
    own = keyring.pseudonym(principal.tenant, "subject", principal.subject)
    if story.tenant != principal.tenant or story.subject != own:
        raise errors.not_found()
    records = [_record(reader, principal.tenant, entry) for entry in reader.receipts(request_id)]
    return {"request_id": request_id, "status": story.status, "records": records}


def _record(reader: AuditReader, tenant: str, entry: NumberedReceipt) -> dict[str, Any]:
    return {
        "type": entry.type,
        "receipt": str(entry.receipt),
        "leaf_hash": entry.receipt.leaf_hash,
        "leaf_index": entry.leaf_index,
        "inclusion": _inclusion(reader, tenant, entry),
    }


def _inclusion(reader: AuditReader, tenant: str, entry: NumberedReceipt) -> dict[str, Any] | None:
    if entry.leaf_index is None:
        return None
    try:
        proof = reader.inclusion_at(tenant, entry.leaf_index)
    except NotSignedYet:
        return None
    return {
        "tree_size": proof.signed.checkpoint.size,
        "hashes": [value.hex() for value in proof.hashes],
        "checkpoint": proof.signed.note,
    }
