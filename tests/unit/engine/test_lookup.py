"""Guesses from where the latest tokens stood before, and how many of them."""

from __future__ import annotations

from engine.lookup import GRAM, PAUSE, REMEMBERED, PromptLookup


def test_what_followed_last_time_is_guessed_and_never_more_than_there_is_room() -> None:
    lookup = PromptLookup(4)
    tokens = [1, 2, 3, 9, 8, 7, 6, 5, 1, 2, 3]
    assert lookup.guess(tokens, 10) == (9, 8, 7, 6)
    assert lookup.guess(tokens, 2) == (9, 8)
    assert lookup.guess([*tokens, 4, 1, 2, 3], 10) == (4, 1, 2, 3)  # the latest time counts
    assert PromptLookup(4).guess([1, 2, 3, 4], 10) == ()
    assert PromptLookup(4).guess([1, 2], 10) == ()


def test_the_latest_tokens_do_not_find_themselves() -> None:
    assert PromptLookup(4).guess([5] * (GRAM + 1), 10) == (5,)
    assert PromptLookup(4).guess([5] * GRAM, 10) == ()


def test_guesses_that_come_true_are_made_longer_and_others_shorter_until_there_are_none_for_a_while() -> None:
    lookup, tokens = PromptLookup(8), list(range(20)) * 2
    assert len(lookup.guess(tokens, 99)) == 8
    for right, width in ((2, 4), (0, 2), (2, 4), (0, 2), (0, 1), (1, 2), (0, 1)):
        lookup.learn(len(lookup.guess(tokens, 99)), right)
        assert len(lookup.guess(tokens, 99)) == width
    lookup.learn(1, 0)
    assert [len(lookup.guess(tokens, 99)) for _ in range(PAUSE + 1)] == [0] * PAUSE + [1]


def test_only_the_latest_tokens_are_remembered() -> None:
    tokens = [1, 2, 3, *range(10, 10 + REMEMBERED), 1, 2, 3]
    lookup = PromptLookup(4)
    assert lookup.guess(tokens, 10) == ()
    assert len(lookup._after) <= REMEMBERED
