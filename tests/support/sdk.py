"""The official `openai` client, pointed at a gateway of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from tests.support.gateway import RunningGateway
from tests.support.tenant import MODEL

CONTRACT_HEADERS = ("x-request-id", "probity-receipt", "probity-policy", "probity-model")


@contextmanager
def openai_client(gateway: RunningGateway, *roles: str, **claims: str) -> Iterator[openai.OpenAI]:
    """Yield a client that never tries again by itself."""
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=gateway.credential(*roles, **claims), max_retries=0, timeout=60
    ) as client:
        yield client


def ask(client: openai.OpenAI, text: str = "a question", **more: Any) -> Any:
    """Return the answer to one chat message."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
    return client.chat.completions.create(**asked)


def ask_raw(client: openai.OpenAI, text: str = "a question", **more: Any) -> Any:
    """Return the response around the answer, for its headers."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
    return client.chat.completions.with_raw_response.create(**asked)


def streamed_text(stream: Any, choice: int = 0) -> str:
    return "".join(
        part.delta.content or "" for chunk in stream for part in chunk.choices if part.index == choice and part.delta
    )
