"""Benchmarks are not run here; that each can be started is seen here, and not when somebody wants its figures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(".".join(file.relative_to(BENCHMARKS).with_suffix("").parts) for file in BENCHMARKS.rglob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_finds_what_it_imports_and_says_how_it_is_run(name: str) -> None:
    module = import_module(f"tests.benchmarks.{name}")
    assert f"python -m {module.__name__}" in (module.__doc__ or "")
