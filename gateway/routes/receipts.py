"""`GET /v1/receipts/{request_id}`: an application holds the gateway to its receipts.

The answer is what an outsider needs to check, without trusting this server: the leaf hash and index of each record of
the request, the inclusion proof, and the signed checkpoint it leads to. Proofs follow numbering by at most a second;
until then `leaf_index` is null.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from gateway import errors
from gateway.auth.permissions import Permission, requires
from gateway.state import state_of

router = APIRouter(prefix="/v1/receipts")


@router.get("/{request_id}", dependencies=[requires(Permission.INFER)])
async def get_receipt(request: Request, request_id: str) -> dict[str, Any]:
    state, principal = state_of(request), request.state.principal
    receipt = await asyncio.to_thread(state.reader.receipt, principal.tenant, principal.subject, request_id)
    if receipt is None:
        raise errors.receipt_not_found()
    return receipt
