"""What the README's first screen shows is run, as it stands there, in a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.settings import settings_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.partition("## The house")[0]
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", FIRST_SCREEN, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(300)
def test_the_first_screen_does_what_it_says(tmp_path: Path) -> None:
    install, verify, cheat = BLOCKS
    assert install == "make demo ONCE=1\n"
    # The Makefile's own recipe, on the installation that runs this test instead of a second one.
    demo = _run("python -m gateway.cli demo --once", tmp_path)
    assert demo.returncode == 0, demo.stdout[-3000:] + demo.stderr[-3000:]
    assert demo.stdout.count("held") >= 7
    verified = _run(verify.partition("\n")[2], tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    cheated = _run(cheat, tmp_path)
    assert "refused" in cheated.stdout
    assert "caught" in cheated.stdout
    assert "leaf" in cheated.stdout


def test_the_makefile_runs_the_demo_that_the_test_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(BIN)/probity demo $(if $(ONCE),--once)" in makefile
    assert 'probity = "gateway.cli:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_setting_stands_in_the_table() -> None:
    assert settings_table() in README


def _run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(directory), "COLUMNS": "120"}
    return subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
