"""Prompt lookup: guesses the next tokens of a sequence from where its latest ones stood before.

A guess is computed on beside the token it follows, and what is sampled after each tells how far it was right: the
output is the same with and without, in its bits, only sooner where an answer repeats its prompt or itself. How many
tokens are guessed follows how many of the latest guesses were right, of this sequence alone.

Source: Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., ICML 2023 (speculative decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3  # tokens that must have stood together before
REMEMBERED = 8_192  # latest tokens that are looked through
PAUSE = 16  # tokens without a guess, once none came true


class PromptLookup:
    __slots__ = ("_after", "_indexed", "_most", "_paused", "_width")

    def __init__(self, most: int) -> None:
        """`most`: tokens guessed at once."""
        self._most = most
        self._width = most  # tokens to guess next time
        self._paused = 0  # tokens to go until there is a guess again
        self._after: dict[tuple[int, ...], int] = {}  # GRAM tokens → where what followed them stands
        self._indexed = 0  # leading tokens that were looked through

    def guess(self, tokens: Sequence[int], room: int) -> tuple[int, ...]:
        """Return at most `room` tokens that may follow `tokens`, which grow from call to call."""
        if self._paused:
            self._paused -= 1
            return ()
        self._index(tokens)
        at = self._after.get(tuple(tokens[-GRAM:]))
        return tuple(tokens[at : at + min(self._width, room)]) if at is not None else ()

    def learn(self, guessed: int, right: int) -> None:
        """Note how many of the tokens guessed last came true."""
        if right == guessed:
            self._width = min(self._most, 2 * self._width)
        elif right == 0 and self._width == 1:
            self._paused = PAUSE
        elif 2 * right < guessed:
            self._width = max(1, self._width // 2)

    def _index(self, tokens: Sequence[int]) -> None:
        """Look through tokens up to the last but one: the latest GRAM must not find itself."""
        start = max(self._indexed, GRAM, len(tokens) - REMEMBERED)
        for end in range(start, len(tokens)):
            self._after[tuple(tokens[end - GRAM : end])] = end
        self._indexed = max(start, len(tokens))
