"""A long prompt that is slow to inspect keeps nobody else waiting, and is inspected all the same."""

from __future__ import annotations

import threading
from pathlib import Path

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


def test_what_stands_at_the_end_of_a_long_prompt_is_found(tmp_path: Path) -> None:
    engine = ScriptedEngine(context_length=1 << 20)
    with running_gateway(tmp_path, engine, obligations="guardrails: [pii-in]", sections=SECTIONS) as gateway:
        answer = Hand(gateway, "app").post("/v1/chat/completions", asking("all is well. " * 700 + CARDS[0]))
    assert answer.status_code == 200
    (prompt,) = engine.prompts
    assert "[CARD]" in prompt
    assert CARDS[0] not in prompt
