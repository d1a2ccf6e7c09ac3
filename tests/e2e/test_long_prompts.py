"""A long prompt that is slow to inspect keeps nobody else waiting, and is inspected all the same."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.gateway import running_gateway
from tests.support.guardrails import CARDS
from tests.support.officers import Hand
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import MODEL

SLOW = "2 " * 60_000  # a card may begin at every digit
SECTIONS = """
guardrails:
  pii-in: {detector: pii, stage: input, action: redact, entities: [card], on_error: block}
"""


def asking(text: str) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]}


def test_short_questions_are_answered_while_a_long_one_is_inspected(tmp_path: Path) -> None:
    """On the event loop, the inspection would let at most the few pass that came before it."""
    engine = ScriptedEngine()
    with running_gateway(tmp_path, engine, obligations="guardrails: [pii-in]", sections=SECTIONS) as gateway:
        app = Hand(gateway, "app")
        long = threading.Thread(target=Hand(gateway, "app").post, args=("/v1/chat/completions", asking(SLOW)))
        long.start()
        answered = 0
        while long.is_alive():
            assert app.post("/v1/chat/completions", asking("hello")).status_code == 200
            answered += 1
    assert answered > 5


class SlowToRead(ScriptedEngine):
    """It renders and counts a long prompt only once it is let."""

    def __init__(self) -> None:
        super().__init__(context_length=1 << 20)
        self.let = threading.Event()
        self.waits: list[str] = []

    def render_chat(self, messages: Sequence[Mapping[str, object]], **more: Any) -> str:
        self._wait(str(messages), "rendered")
        return super().render_chat(messages, **more)

    def encode(self, text: str, *, chat: bool) -> list[int]:
        self._wait(text, "counted")
        return super().encode(text, chat=chat)

    def _wait(self, text: str, what: str) -> None:
        if len(text) > 10_000:
            self.waits.append(what)
            assert self.let.wait(30)


def test_short_questions_are_answered_while_a_long_one_is_rendered_and_counted(tmp_path: Path) -> None:
    """A tokenizer takes seconds for a body of the greatest size."""
    engine = SlowToRead()
    with running_gateway(tmp_path, engine) as gateway, ThreadPoolExecutor(1) as pool:
        app, patient = Hand(gateway, "app"), Hand(gateway, "app")
        long = pool.submit(patient.post, "/v1/chat/completions", asking("word " * 4_000))
        while not engine.waits:
            assert app.post("/v1/chat/completions", asking("hello")).status_code == 200
        for _ in range(5):
            assert app.post("/v1/chat/completions", asking("hello")).status_code == 200
        assert not long.done()
        engine.let.set()
        assert long.result().status_code == 200
    assert engine.waits == ["rendered", "counted"]


def test_what_stands_at_the_end_of_a_long_prompt_is_found(tmp_path: Path) -> None:
    engine = ScriptedEngine(context_length=1 << 20)
    with running_gateway(tmp_path, engine, obligations="guardrails: [pii-in]", sections=SECTIONS) as gateway:
        answer = Hand(gateway, "app").post("/v1/chat/completions", asking("all is well. " * 700 + CARDS[0]))
    assert answer.status_code == 200
    (prompt,) = engine.prompts
    assert "[CARD]" in prompt
    assert CARDS[0] not in prompt
