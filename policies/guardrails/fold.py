"""Folding: text as detectors look at it, with the way back to the text as it was written.

A card number in full-width digits, or with zero-width spaces between them, is a card number. Folding maps each
character to one plain character, or drops it; `origins` says where each folded character came from, so that a match
is cut out of the original whole. Printable ASCII folds to itself at no cost, and folding twice changes nothing.

Source: Unicode Standard Annex 15 (NFKC), used per character; what a reader cannot see (general categories Cf, Mn, Me,
control characters, Hangul fillers) is dropped.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

_UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # the blanks among the control characters stay: \t \n \v \f \r
_FILLERS = "\u115f\u1160\u3164\uffa0"  # Hangul fillers are letters that show nothing
_BRAILLE_BLANK = "\u2800"


@dataclass(frozen=True, slots=True)
class Folded:
    text: str
    origins: tuple[int, ...] | None  # origins[i] is where text[i] stood; None: text is the original

    def original_span(self, start: int, end: int) -> tuple[int, int]:
        """Return the span of the original text that folded to text[start:end] (start < end)."""
        if self.origins is None:
            return start, end
        return self.origins[start], self.origins[end - 1] + 1


def fold(text: str) -> Folded:
    if text.isascii() and _UNSEEN.search(text) is None:
        return Folded(text, None)
    folded: list[str] = []
    origins: list[int] = []
    for position, character in enumerate(text):
        plain = _plain(character)
        if plain:
            folded.append(plain)
            origins.append(position)
    return Folded("".join(folded), tuple(origins))


@lru_cache(maxsize=16_384)
def _plain(character: str) -> str:
    """Return one character, or none for what cannot be seen."""
    if character.isascii():
        return "" if _UNSEEN.match(character) else character
    category = unicodedata.category(character)
    if category in ("Cc", "Cf", "Mn", "Me") or character in _FILLERS:
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd" or character == "−":
        return "-"
    if category == "Zs" or character == _BRAILLE_BLANK:
        return " "
    if category == "Cs":
        return "\ufffd"  # half a character has no UTF-8, and a detector would fail on it
    compatible = unicodedata.normalize("NFKC", character)
    if len(compatible) != 1 or compatible == character:
        return character
    return _plain(compatible)
