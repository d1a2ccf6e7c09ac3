"""The commands' way to a gateway's officers' API: over HTTP, so that every look is on record like anybody's.

OfficerRefused    the gateway says no, or there is none; the message says why and repeats no credential
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

TIMEOUT_S = 120.0  # a replay takes as long as the answer did


class OfficerRefused(Exception):
    """The gateway refuses, or does not answer."""


class OfficerClient:
    def __init__(self, url: str, credential: str) -> None:
        self._http = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {credential}"}, timeout=TIMEOUT_S, trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def search(self, filters: Mapping[str, str]) -> dict[str, Any]:
        return self._ask("GET", "/audit/requests", params=dict(filters))

    def show(self, request_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/audit/requests/{_segment(request_id)}")

    def reveal(self, request_id: str, reason: str, case: str | None = None) -> dict[str, Any]:
        body = {"reason": reason} if case is None else {"reason": reason, "case": case}
        return self._ask("POST", f"/audit/requests/{_segment(request_id)}:reveal", json=body)

    def replay(self, request_id: str, mode: str = "regenerate") -> dict[str, Any]:
        return self._ask("POST", f"/audit/requests/{_segment(request_id)}:replay", json={"mode": mode})

    def inclusion(self, tenant: str, writer: str, writer_seq: int) -> dict[str, Any]:
        """Raises NotYet while no checkpoint covers the leaf."""
        where = {"tenant": tenant, "writer": writer, "writer_seq": str(writer_seq)}
        return self._ask("GET", "/audit/proofs/inclusion", params=where)

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **more)
        except httpx.TransportError as error:
            raise OfficerRefused(
                f"no gateway answers ({type(error).__name__}); start one with `probity serve`"
            ) from error
        if response.is_success:
            answer: dict[str, Any] = response.json()
            return answer
        problem = _problem(response)
        kind = NotYet if problem.get("title") == "not_signed_yet" else OfficerRefused
        raise kind(f"{response.status_code}: {problem.get('detail', 'the gateway gave no reason')}")


class NotYet(OfficerRefused):
    """No signed checkpoint covers it yet: ask again in a moment."""


def answers(url: str) -> bool:
    """Return whether a gateway answers at `url`."""
    try:
        return httpx.get(f"{url}/livez", trust_env=False, timeout=2).is_success
    except httpx.TransportError:
        return False


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _segment(request_id: str) -> str:
    """Return the id as one path segment: what is typed cannot name another path."""
    if not request_id or not all(character.isalnum() or character == "-" for character in request_id):
        raise OfficerRefused("a request id has letters, digits and `-` only; `x-request-id` of an answer is one")
    return request_id
