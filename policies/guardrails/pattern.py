"""Entities: what a detector looks for, each with a local finder and a longest span.

A finder is *local*: whether text[s:e] is a match depends on at most `CONTEXT` characters before s and `longest` from s
on, plus one. That makes streaming exact: once these are known, the matches that start at s are final, whatever comes
later (inspect.py). Most text is final sooner: an entity's `unsettled` says how a text ends in which a match may still
begin or grow; what stands before that is settled. A finder looks at every place where a match may begin; it never skips
one because an earlier match covers it, except where both end alike.

Matching is linear: RE2 only, over the text once or over a bounded slice behind each start (RE2's binding encodes the
whole text at every call: searching on from a position would be quadratic). Where Hyperscan is installed it says first,
in one pass over all entities, which of them can occur at all; what it lets pass is decided by the same finders, so the
answers are the same with and without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import re2

try:
    import hyperscan
except ImportError:  # not built for this machine: RE2 alone, slower
    hyperscan = None  # type: ignore[assignment]

CONTEXT = 8  # characters before a start that a finder may look at

Finder = Callable[[str], Iterator[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Entity:
    name: str  # `[a-z0-9_]+`
    trigger: str  # a pattern that occurs in every text in which `find` finds something; RE2 and Hyperscan syntax
    # A pattern of every end of a text from which, with more text, a match could begin that is not found yet, or grow.
    unsettled: str
    find: Finder  # folded text → spans
    longest: int  # characters of folded text that a match spans at most
    needs: str = ""  # characters, as in a class; where a text has none of them, `find` finds nothing. Empty: any text


def beginning(literal: str) -> str:
    """Return a pattern of the literal's proper beginnings: `k(?:e)?` for `key`."""
    pattern = ""
    for character in reversed(literal[:-1]):
        pattern = re2.escape(character) + (f"(?:{pattern})?" if pattern else "")
    return pattern


def occurrences(text: str, literal: str) -> Iterator[int]:
    """Yield every place where `literal` begins, overlapping ones too."""
    at = text.find(literal)
    while at >= 0:
        yield at
        at = text.find(literal, at + 1)


class Prefilter:
    """Which entities may occur in a text. Never says no where a finder would find something."""

    def __init__(self, entities: Sequence[Entity], *, use_hyperscan: bool = True) -> None:
        self._entities = tuple(entities)
        self._triggers = [re2.compile(entity.trigger) for entity in entities]
        needs = [entity.needs for entity in entities]
        self._needed = re.compile(f"[{''.join(needs)}]") if entities and all(needs) else None
        self._unsettled = re2.compile(f"(?:{'|'.join(entity.unsettled for entity in entities)})" + r"\z")
        self._scratch = Lock()  # Hyperscan's working memory serves one scan at a time
        self._database = _compile(entities) if use_hyperscan and hyperscan is not None else None

    def settled(self, text: str) -> int:
        """Return the position before which no match can begin or grow any more, whatever text follows."""
        # As bytes: the binding need not count characters.
        match = self._unsettled.search(text.encode() if text.isascii() else text)
        return len(text) if match is None else int(match.start())

    def candidates(self, text: str) -> list[Entity]:
        # By `re`: the others let go of the interpreter however short a text is, and another thread may keep it a while.
        if self._needed is not None and self._needed.search(text) is None:
            return []
        if self._database is None:
            return [
                entity
                for entity, trigger in zip(self._entities, self._triggers, strict=True)
                if trigger.search(text) is not None
            ]
        seen: set[int] = set()

        def on_match(index: int, _start: int, _end: int, _flags: int, _context: object) -> None:
            seen.add(index)

        with self._scratch:
            self._database.scan(text.encode("utf-8", "replace"), match_event_handler=on_match)
        return [self._entities[index] for index in sorted(seen)]


def _compile(entities: Sequence[Entity]) -> Any:
    database = hyperscan.Database()
    database.compile(
        expressions=[entity.trigger.encode() for entity in entities],
        ids=list(range(len(entities))),
        elements=len(entities),
        flags=[hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_DOTALL] * len(entities),
    )
    return database
