"""Clients that stream answers and remember every byte they saw, also when the server dies under them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import httpx
import orjson


@dataclass(slots=True)
class Seen:
    """What one client saw of one answer."""

    status: int | None = None
    request_id: str | None = None
    text: str = ""
    finish_reason: str | None = None
    done: bool = False
    error: dict[str, object] | None = None
    headers: dict[str, str] = field(default_factory=dict)


async def stream_chat(client: httpx.AsyncClient, model: str, prompt: str, seen: Seen, **fields: object) -> Seen:
    """Stream one chat answer into `seen`; a connection that breaks just ends it."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}], **fields}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            seen.status = response.status_code
            seen.headers = dict(response.headers)
            seen.request_id = response.headers.get("x-request-id")
            if response.status_code != 200:
                seen.error = orjson.loads(await response.aread()).get("error")
                return seen
            async for line in response.aiter_lines():
                _take(line, seen)
    except httpx.TransportError:
        pass
    return seen


def _take(line: str, seen: Seen) -> None:
    if not line.startswith("data: "):
        return
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        seen.done = True
        return
    event = orjson.loads(data)
    if "error" in event:
        seen.error = event["error"]
        return
    for choice in event["choices"]:
        seen.text += choice["delta"].get("content") or ""
        seen.finish_reason = choice["finish_reason"] or seen.finish_reason


async def stream_many(
    base_url: str, token: str, model: str, prompts: list[str], *, seen: list[Seen] | None = None, **fields: object
) -> list[Seen]:
    """Stream all prompts at once, into `seen` where it is given."""
    limits = httpx.Limits(max_connections=len(prompts))
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=base_url, headers=headers, limits=limits, timeout=60) as client:
        seen = seen or [Seen() for _ in prompts]
        await asyncio.gather(
            *(stream_chat(client, model, prompt, one, **fields) for prompt, one in zip(prompts, seen, strict=True))
        )
        return seen
