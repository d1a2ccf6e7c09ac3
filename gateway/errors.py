"""What a caller is told when the answer is no: the one table of contract.md, and how each row is written on the wire.

ApiError            a named refusal; every constructor below makes one row of the table
ResponseBroken      the response had begun when something failed: the connection is cut, nothing more is said

Two renderings of one error. Under `/v1`, as the OpenAI SDKs read it:

    {"error":{"message":"denied by policy","type":"permission_error","param":null,"code":"policy_denied"}}

Under `/audit` and `/admin`, RFC 9457 (`application/problem+json`):

    {"type":"urn:probity:error:policy_denied","title":"policy_denied","status":403,"detail":"denied by policy"}

A message never contains what the caller sent, beyond names that we declared ourselves.

Source: contract.md; the OpenAI API reference, error codes; RFC 9457; RFC 9110 section 10.2.3 (retry-after).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import orjson

AUDIT_RETRY_S = 2  # seconds a caller waits before it tries again when the log could not confirm
ENGINE_RETRY_S = 1
DRAIN_RETRY_S = 5
MAX_RETRY_AFTER_S = 86_400


class ApiError(Exception):
    """A refusal by name. Raise it anywhere before the response head is sent."""

    def __init__(
        self,
        status: int,  # 400 … 599
        code: str,
        type: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.type = type
        self.message = message
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})

    def with_headers(self, headers: Mapping[str, str]) -> Self:
        """Return this error with `headers` added."""
        self.headers.update(headers)
        return self

    @property
    def openai_body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    @property
    def problem_body(self) -> bytes:
        problem: dict[str, object] = {
            "type": f"urn:probity:error:{self.code}",
            "title": self.code,
            "status": self.status,
            "detail": self.message,
        }
        if self.param is not None:
            problem["param"] = self.param
        return orjson.dumps(problem)


class ResponseBroken(Exception):
    """A response could not be finished. Carries no cause: what failed was noted where it failed."""


# --- the table of contract.md, one constructor a row ---


def invalid_api_key() -> ApiError:
    """No, a bad or an expired credential. One constant answer: which of them it was is nobody's business."""
    return ApiError(
        401,
        "invalid_api_key",
        "invalid_request_error",
        "a valid credential is required; send `authorization: Bearer <credential>`",
        headers={"www-authenticate": 'Bearer realm="probity"'},
    )


def policy_denied(message: str = "denied by policy") -> ApiError:
    return ApiError(403, "policy_denied", "permission_error", message)


def permission_denied() -> ApiError:
    """The credential is good and its roles do not allow this route, or not for this tenant."""
    return ApiError(
        403, "permission_denied", "permission_error", "the credential's roles do not allow this; ask an administrator"
    )


def suspended() -> ApiError:
    return ApiError(403, "suspended", "permission_error", "service is suspended here; ask an administrator")


def model_not_found() -> ApiError:
    """Unknown, not approved, expired or not permitted: one answer."""
    return ApiError(
        404,
        "model_not_found",
        "invalid_request_error",
        "the model does not exist or is not available to you; `/v1/models` lists those that are",
        param="model",
    )


def not_found() -> ApiError:
    return ApiError(404, "not_found", "invalid_request_error", "there is nothing here")


def receipt_not_found() -> ApiError:
    """No such request, or not the caller's own: one answer."""
    return ApiError(
        404, "receipt_not_found", "invalid_request_error", "you have no request of this id", param="request_id"
    )


def method_not_allowed() -> ApiError:
    return ApiError(405, "method_not_allowed", "invalid_request_error", "the method is not allowed here")


def content_filter(guardrail: str) -> ApiError:
    """An input guardrail blocks. `guardrail` is its id in the policy."""
    return ApiError(
        400, "content_filter", "invalid_request_error", f"the guardrail `{guardrail}` does not let this prompt pass"
    )


def context_length_exceeded(context_length: int, prompt_tokens: int, param: str = "messages") -> ApiError:
    """The prompt, or the prompt and the output asked for, are longer than the context. Counts in tokens."""
    return ApiError(
        400,
        "context_length_exceeded",
        "invalid_request_error",
        f"the context holds {context_length} tokens and the prompt has {prompt_tokens}; shorten it or ask for less",
        param=param,
    )


def rate_limit_exceeded(limit: str, retry_after_s: float) -> ApiError:
    """Rate or concurrency. `limit` is its id in the policy; `retry_after_s` seconds until it is worth trying."""
    return ApiError(
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
        f"the limit `{limit}` is reached; try again later",
        headers=_retry_after(retry_after_s),
    )


def insufficient_quota(limit: str) -> ApiError:
    """A budget is spent: trying again soon does not help, and the SDKs are told so."""
    return ApiError(
        429,
        "insufficient_quota",
        "insufficient_quota",
        f"the budget `{limit}` is spent; ask an administrator",
        headers={"x-should-retry": "false"},
    )


def body_too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, "request_too_large", "invalid_request_error", f"the body is larger than {max_bytes} bytes; send less"
    )


def request_timeout() -> ApiError:
    """The request did not come in time. Whoever sent it may send it again, faster."""
    return ApiError(
        408, "request_timeout", "invalid_request_error", "the request did not arrive in time; send it again"
    )


def headers_too_large(max_bytes: int) -> ApiError:
    return ApiError(
        431, "headers_too_large", "invalid_request_error", f"the headers are larger than {max_bytes} bytes; send fewer"
    )


def invalid_request(message: str, param: str | None = None) -> ApiError:
    """The body is malformed, or a field of it cannot be honoured. `message` never contains what was sent."""
    return ApiError(400, "invalid_request", "invalid_request_error", message, param=param)


def audit_unavailable() -> ApiError:
    return ApiError(
        503,
        "audit_unavailable",
        "server_error",
        "the audit log cannot confirm records at the moment, so nothing is answered; try again later",
        headers=_retry_after(AUDIT_RETRY_S),
    )


def overloaded() -> ApiError:
    return ApiError(
        503,
        "overloaded",
        "server_error",
        "too many requests are in progress; try again later",
        headers=_retry_after(ENGINE_RETRY_S),
    )


def draining() -> ApiError:
    return ApiError(
        503,
        "draining",
        "server_error",
        "the server is shutting down; try again later",
        headers=_retry_after(DRAIN_RETRY_S),
    )


def engine_unavailable() -> ApiError:
    return ApiError(
        503,
        "engine_unavailable",
        "server_error",
        "the model cannot answer at the moment; try again later",
        headers=_retry_after(DRAIN_RETRY_S),
    )


def internal_error() -> ApiError:
    return ApiError(500, "internal_error", "server_error", "the server failed; the request was not answered")


def _retry_after(seconds: float) -> dict[str, str]:
    whole = math.ceil(seconds) if math.isfinite(seconds) else MAX_RETRY_AFTER_S
    return {"retry-after": str(min(max(whole, 1), MAX_RETRY_AFTER_S))}
