"""The detectors that a policy may name, and what each can find. A closed list: the document's validator knows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from policies.guardrails import pii, secrets
from policies.guardrails.pattern import Entity, Prefilter


@dataclass(frozen=True)
class Detector:
    name: str
    known: tuple[Entity, ...]

    @cached_property
    def entities(self) -> frozenset[str]:
        return frozenset(entity.name for entity in self.known)

    def chosen(self, names: Iterable[str]) -> tuple[Entity, ...]:
        """Return the entities of these names; all, if none is named."""
        wanted = set(names) or self.entities
        return tuple(entity for entity in self.known if entity.name in wanted)


DETECTORS = {
    detector.name: detector for detector in (Detector("pii", pii.ENTITIES), Detector("secrets", secrets.ENTITIES))
}


@lru_cache(maxsize=256)
def longest_span(detector: str, entities: tuple[str, ...]) -> int | None:
    """Return the characters that the longest match can span; None where there is no bound."""
    return max(entity.longest for entity in DETECTORS[detector].chosen(entities))


@lru_cache(maxsize=256)
def chosen(detector: str, entities: tuple[str, ...]) -> tuple[Entity, ...]:
    return DETECTORS[detector].chosen(entities)


@lru_cache(maxsize=256)
def prefilter(*wanted: tuple[str, tuple[str, ...]]) -> Prefilter:
    """Return one for all that is wanted, (detector, its entities): they look at a text in one pass."""
    return Prefilter(tuple(dict.fromkeys(entity for one in wanted for entity in chosen(*one))))
