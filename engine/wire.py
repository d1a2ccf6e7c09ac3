"""What passes between the gateway's process and the engine's, beside the messages and events of worker.py.

    gateway ── EngineConfig ▶ … then Message | Compile | Release | Where ──▶ engine
    gateway ◀── Progressed … ▶ Ready or an EngineStartError, then Event | Compiled ── engine

Over two pipes that nobody else holds, pickled: both ends are one program of one user.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.reading import KeptFiles
from engine.request import RequestRefused, Structure
from engine.runtime import Served


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far a file is read."""

    name: str
    done: int  # bytes
    size: int


@dataclass(frozen=True, slots=True)
class Ready:
    served: Served
    files: KeptFiles  # that the tokenizer was made of


@dataclass(frozen=True, slots=True)
class Compile:
    ticket: int  # stands for what was compiled, until it is released
    structure: Structure


@dataclass(frozen=True, slots=True)
class Compiled:
    ticket: int
    refusal: RequestRefused | None


@dataclass(frozen=True, slots=True)
class Release:
    ticket: int


@dataclass(frozen=True, slots=True)
class Where:
    """Tell of Trouble: where the step stands."""
