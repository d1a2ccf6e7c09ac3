"""What passes between processes is, at the other end, what was sent."""

from __future__ import annotations

import pickle
from dataclasses import fields

from engine.core import Emission
from engine.request import FinishReason, GenerationFailed, GenerationStats, TokenDelta, TokenLogprob

STATS = GenerationStats(7, 3, 2, 1, 0.25, 0.5, 1.5, "ab" * 32)
WHOLE = TokenDelta(
    "text",
    (5, 6),
    (TokenLogprob(5, -0.5, ((5, -0.5), (9, -1.5))),),
    FinishReason.STOP,
    STATS,
    (TokenLogprob(1, -2.0),),
    b"\x00\x01",
)


def test_every_field_of_a_delta_comes_across() -> None:
    assert all(getattr(WHOLE, field.name) for field in fields(TokenDelta))
    assert pickle.loads(pickle.dumps(WHOLE)) == WHOLE
    assert pickle.loads(pickle.dumps(TokenDelta("", ()))) == TokenDelta("", ())


def test_every_field_of_an_emission_comes_across() -> None:
    assert pickle.loads(pickle.dumps(Emission("r", WHOLE))) == Emission("r", WHOLE)
    failed = pickle.loads(pickle.dumps(Emission("r", WHOLE, GenerationFailed("too long"))))
    assert [getattr(failed, field.name) for field in fields(Emission)][:2] == ["r", WHOLE]
    assert isinstance(failed.failure, GenerationFailed)
    assert str(failed.failure) == "too long"
