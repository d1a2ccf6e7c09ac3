"""The trail: log-probabilities on their way to the caller, each with the text it belongs to or later, never before.

A log-probability shows its token. The engine holds text back while a character or a stop string is undecided, and an
inspector holds more of it; what is held is not on record yet, so its tokens must not leave either. Tokens are matched
to text by counting characters; where the two disagree (a tokenizer that drops a leading blank), the trail lags.

Knows no journal and no outbox.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterable

from engine.request import TokenLogprob

TokenText = Callable[[int], bytes]


class Trail:
    """Of one choice."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0  # of all tokens so far
        self._open: list[TokenLogprob] = []  # their last character is not complete
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # with the characters that must be released first

    def add(self, entries: Iterable[TokenLogprob]) -> None:
        for entry in entries:
            self._open.append(entry)
            self._characters += len(self._decoder.decode(self._token_text(entry.token)))
            if not self._decoder.getstate()[0]:
                self._waiting.extend((self._characters, complete) for complete in self._open)
                self._open = []

    def take(self, released: int) -> tuple[TokenLogprob, ...]:
        """Return what may leave once `released` characters of the choice are on record."""
        taken = []
        while self._waiting and self._waiting[0][0] <= released:
            taken.append(self._waiting.popleft()[1])
        return tuple(taken)

    def rest(self) -> tuple[TokenLogprob, ...]:
        """Return all that is left: only once the closing record, which holds every token, is durable."""
        left = (*(entry for _, entry in self._waiting), *self._open)
        self._waiting.clear()
        self._open = []
        return left
