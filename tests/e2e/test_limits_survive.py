"""Limits are rebuilt from the log: a restart forgives nothing."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.support.gateway import RunningGateway, running_gateway
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL

LIMITS = "limits:\n  narrow: {per_subject: {requests_per_minute: 3}}\n"


def _ask(gateway: RunningGateway, subject: str = "mia@test.example") -> None:
    client = openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=gateway.credential("app", subject=subject), max_retries=0
    )
    with client:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=8)


def test_requests_of_the_last_minute_still_count_after_a_restart(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine(), obligations="limits: narrow", sections=LIMITS) as gateway:
        _ask(gateway)
        _ask(gateway)
    with running_gateway(tmp_path, ScriptedEngine(), obligations="limits: narrow", sections=LIMITS) as gateway:
        _ask(gateway)
        with pytest.raises(openai.RateLimitError) as refused:
            _ask(gateway)
        assert refused.value.code == "rate_limit_exceeded"
        assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
        _ask(gateway, subject="otto@test.example")
