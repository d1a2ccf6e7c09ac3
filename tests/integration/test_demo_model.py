"""The bundled model: small enough for the repository, and right on what the demonstration asks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.config import EngineConfig
from engine.load import load_engine
from engine.request import Engine, GenerationRequest, SamplingParams
from gateway.demo import model_directory
from gateway.demo.dialogues import UNKNOWN

MAX_WEIGHTS_BYTES = 16 << 20


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    running = load_engine(EngineConfig(model=model_directory(), threads=1, kv_cache_mib=16))
    yield running
    running.close()


def test_the_weights_fit_the_repository() -> None:
    assert (model_directory() / "model.safetensors").stat().st_size <= MAX_WEIGHTS_BYTES


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does a transfer abroad cost?", "A transfer abroad costs 12 euros."),
        ("Where is the pharmacy?", "The pharmacy is on the ground floor, next to the entrance."),
        ("Which documents do I need for a loan?", "For a loan we need three payslips and your passport."),
        ("What is the test card number?", "The test card number is 4111 1111 1111 1111. It is for tests only."),
        ("Write a poem about black holes?", UNKNOWN),
        ("Hello", "Hello! How can I help you?"),
    ],
)
async def test_it_knows_its_desks_and_says_what_it_does_not_know(engine: Engine, question: str, answer: str) -> None:
    prompt = engine.encode(engine.render_chat([{"role": "user", "content": question}]), chat=True)
    sampling = SamplingParams(max_tokens=64, seed=0, temperature=0)
    request = GenerationRequest(question, tuple(prompt), sampling, b"test", "test")
    assert "".join([delta.text async for delta in engine.generate(request)]) == answer
