"""A model name that no policy knows is the caller's own text, and does not stand in a leaf for ever."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.support.gateway import running_gateway
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL


def test_only_an_alias_of_the_policy_stands_in_the_leaf_of_a_denial(tmp_path: Path) -> None:
    with running_gateway(tmp_path, ScriptedEngine(context_length=64)) as gateway:
        client = httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {gateway.credential()}"})
        with client:
            body = {"messages": [{"role": "user", "content": "x" * 100}]}
            unknown = client.post("/v1/chat/completions", json={"model": "mia.k@acme.example", **body})
            known = client.post("/v1/chat/completions", json={"model": MODEL, **body})
        assert (unknown.status_code, known.status_code) == (404, 400)
        reader = gateway.rooms.reader
        aliases = [reader.story(answer.headers["x-request-id"]).model["alias"] for answer in (unknown, known)]
        assert aliases == ["(unknown)", MODEL]
        revealed = reader.reveal(unknown.headers["x-request-id"])
        assert b"mia.k@acme.example" in (revealed.prompt or b"")
