"""Folding: text as detectors look at it, with the way back to the text as it was written.

A card number in full-width digits, or with zero-width spaces between them, is a card number. Folding maps each
character to one plain character, or drops it; `origins` says where each folded character came from, so that a match
is cut out of the original whole. ASCII text folds to itself at no cost.

Source: Unicode Standard Annex 15 (NFKC), used per character; general category Cf (format) characters are dropped.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache


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
    if text.isascii():
        return Folded(text, None)
    folded: list[str] = []
    origins: list[int] = []
    for position, character in enumerate(text):
        plain = _plain(character)
        if plain:
            folded.append(plain)
            origins.append(position)
    return Folded("".join(folded), tuple(origins))


@lru_cache(maxsize=4096)
def _plain(character: str) -> str:
    """Return one character, or none for what cannot be seen."""
    if character.isascii():
        return character
    category = unicodedata.category(character)
    if category == "Cf" or category == "Mn":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd" or character == "−":
        return "-"
    if category == "Zs":
        return " "
    compatible = unicodedata.normalize("NFKC", character)
    return compatible if len(compatible) == 1 else character
