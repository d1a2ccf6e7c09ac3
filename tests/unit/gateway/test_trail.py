"""The trail: a token's log-probability leaves with its text or later, whatever the tokens cut through."""

from __future__ import annotations

import random

import pytest

from engine.request import TokenLogprob
from gateway.trail import Trail

TEXT = "Ça coûte 1 € – 🏦👩‍🚀 ok ÿ\0\n" * 3


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """Cut bytes anywhere: tokens need not end where characters do."""
    pieces = []
    while data:
        size = rng.randrange(1, 5)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@pytest.mark.parametrize("seed", range(50))
def test_tokens_shown_are_never_ahead_of_the_text_released(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = cut(TEXT.encode(), rng)
    trail = Trail(vocabulary.__getitem__)
    entries = [TokenLogprob(token, -1.0) for token in range(len(vocabulary))]
    shown: list[int] = []
    released = 0
    for entry in entries:
        trail.add([entry])
        if rng.random() < 0.5:
            generated = len(b"".join(vocabulary[: entry.token + 1]).decode(errors="ignore"))
            released = rng.randrange(released, generated + 1)
            shown += [one.token for one in trail.take(released)]
            seen = b"".join(vocabulary[token] for token in shown)
            assert TEXT[:released].encode().startswith(seen)
    shown += [one.token for one in trail.rest()]
    assert shown == list(range(len(vocabulary)))
    assert trail.rest() == ()


def test_bytes_that_are_no_text_are_replaced_as_in_the_output_and_nothing_runs_ahead() -> None:
    vocabulary = [b"a", b"\xff", b"\xf0\x9f", b"b", b"c"]
    output = b"".join(vocabulary).decode(errors="replace")
    trail = Trail(vocabulary.__getitem__)
    trail.add([TokenLogprob(token, -1.0) for token in range(len(vocabulary))])
    assert [entry.token for entry in trail.take(1)] == [0]
    assert [entry.token for entry in trail.take(2)] == [1]
    assert [entry.token for entry in trail.take(len(output) - 1)] == [2, 3]
    assert [entry.token for entry in trail.take(len(output))] == [4]


def test_a_text_released_whole_shows_all_of_its_tokens() -> None:
    vocabulary = [b"one", b" two", b" three"]
    trail = Trail(vocabulary.__getitem__)
    trail.add([TokenLogprob(token, -1.0) for token in range(3)])
    assert [entry.token for entry in trail.take(len("one two three"))] == [0, 1, 2]
