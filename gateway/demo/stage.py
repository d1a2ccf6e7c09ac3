"""How the demo tells what it does: a numbered step, what was found, and whether it held. Plain where nobody watches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text


class Stage:
    """Writes to one stream; colours only on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def opening(self, text: str) -> None:
        self._console.print(Text(text, style="bold"))

    def step(self, number: int, title: str) -> None:
        self._console.print(Text(f"\n{number}. {title}", style="bold cyan"))

    def facts(self, facts: Sequence[str]) -> None:
        for fact in facts:
            self._console.print(Text(f"   {fact}"))

    def held(self) -> None:
        self._console.print(Text("   held", style="green"))

    def failed(self, title: str, reason: str) -> None:
        self._console.print(Text(f"   FAILED: {title}: {reason}", style="bold red"))

    def line(self, text: str = "") -> None:
        self._console.print(Text(text))
