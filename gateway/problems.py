"""What officers and admins are told when the answer is no, beyond the table that they share with applications.

ApiError (errors.py)
└── PolicyRefused    the document is not a policy; `findings` says where and why, all of them

On the wire (RFC 9457):

    {"type":"urn:probity:error:policy_invalid","title":"policy_invalid","status":422,"detail":"the policy …",
     "findings":[{"path":"rules[0].when","message":"an allow must say which model: give `models_any`"}]}

Source: contract.md, "Auditors", "Admins"; RFC 6585 section 3 (428); RFC 9110 section 13.1.1 (412).
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from gateway.errors import AUDIT_RETRY_S, ApiError

_WRONG = "invalid_request_error"


class PolicyRefused(ApiError):
    """A policy document with findings."""

    def __init__(self, findings: Sequence[tuple[str, str]]) -> None:
        super().__init__(
            422, "policy_invalid", _WRONG, "the policy is refused; correct every finding and send it again"
        )
        self.findings = findings  # (path, message)

    @property
    def problem_body(self) -> bytes:
        findings = [{"path": path, "message": message} for path, message in self.findings]
        return orjson.dumps(orjson.loads(super().problem_body) | {"findings": findings})


def precondition_required() -> ApiError:
    message = "send `if-match` with the `etag` of what you saw, so that no one's change is undone unseen"
    return ApiError(428, "precondition_required", _WRONG, message)


def precondition_failed(etag: str) -> ApiError:
    message = "it has changed since you saw it; read it again and decide anew"
    return ApiError(412, "precondition_failed", _WRONG, message, headers={"etag": etag})


def conflict(message: str) -> ApiError:
    """What is asked for does not fit the state. `message` names the state, nothing that was sent."""
    return ApiError(409, "conflict", _WRONG, message)


def content_erased() -> ApiError:
    return ApiError(
        410, "content_erased", _WRONG, "the content was erased: its key is destroyed; its proofs stay valid"
    )


def evidence_damaged() -> ApiError:
    message = "what is stored is not what was recorded; keep the database as it is and run `probity audit verify`"
    return ApiError(500, "evidence_damaged", "server_error", message)


def not_signed_yet() -> ApiError:
    message = "no signed checkpoint covers this yet; ask again in a moment"
    return ApiError(503, "not_signed_yet", "server_error", message, headers={"retry-after": str(AUDIT_RETRY_S)})


def not_replayable(reason: str) -> ApiError:
    return ApiError(409, "not_replayable", _WRONG, reason)
