"""Where a request came from: the connection says so, unless a proxy that the settings name says otherwise."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support.gateway import running_gateway
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL

FORGED = {"x-forwarded-for": "198.51.100.7", "x-forwarded-proto": "https"}


@pytest.mark.parametrize(
    ("proxies", "source"),
    [([], "127.0.0.1"), (["10.0.0.0/8"], "127.0.0.1"), (["127.0.0.0/8"], "198.51.100.7")],
)
def test_a_forwarded_address_is_believed_from_a_trusted_proxy_only(
    tmp_path: Path, proxies: list[str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # the server library's own switch opens nothing
    with running_gateway(tmp_path, ScriptedEngine(), server__trusted_proxies=proxies) as gateway:
        answer = httpx.post(
            f"{gateway.url}/v1/chat/completions",
            headers={"authorization": f"Bearer {gateway.credential()}", **FORGED},
            json={"model": MODEL, "messages": [{"role": "user", "content": "hello"}]},
        )
        assert answer.status_code == 200
        revealed = gateway.rooms.reader.reveal(answer.headers["x-request-id"])
        assert revealed.identities["source"] == source
