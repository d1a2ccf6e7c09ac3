"""What the README shows is run, as it stands there, in a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.demo import model_directory
from gateway.settings import Settings, settings_table
from tests.support.server import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.partition("## The house")[0]
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", FIRST_SCREEN, re.MULTILINE | re.DOTALL)
SERVING = re.findall(r"^```sh\n(.*?)^```$", README.partition("## Serve it")[2], re.MULTILINE | re.DOTALL)


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


@pytest.mark.timeout(300)
def test_serving_does_what_it_says(tmp_path: Path) -> None:
    """Both blocks of "Serve it" in their order, on the demonstration's data, with its model in place of a real one."""
    demonstration, own = (
        block.replace("127.0.0.1:8080", f"127.0.0.1:{port}").replace("/models/Qwen3-0.6B", str(model_directory()))
        for block, port in zip(SERVING, (free_port(), free_port()), strict=True)
    )
    assert _run("python -m gateway.cli demo --once", tmp_path).returncode == 0
    for script, said in ((demonstration, "A transfer abroad costs 12 euros."), (own, "How can I help you?")):
        port = re.findall(r"127\.0\.0\.1:(\d+)", script)[0]
        done = _run(
            f"export PROBITY_SERVER_PORT={port}; set -e; trap 'kill %1 2>/dev/null; wait' EXIT\n{script}", tmp_path
        )
        assert said in done.stdout, done.stdout + done.stderr[-3000:]
        assert done.stdout.count('"error"') == 0


def test_the_makefile_runs_the_demo_that_the_test_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(BIN)/probity demo $(if $(ONCE),--once)" in makefile
    assert 'probity = "gateway.cli:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_port_that_is_shown_is_the_one_that_is_served() -> None:
    shown = set(re.findall(r"127\.0\.0\.1:(\d+)", README))
    assert shown == {str(Settings().server.port)}


def test_every_setting_stands_in_the_table() -> None:
    assert settings_table() in README


def _run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = directory / "bin" / "probity"  # what the installation puts there; here the code under test
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway.cli "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(directory), "COLUMNS": "120"}
    environment["PROBITY_ENGINE_KERNELS"] = "library"  # to compile takes seconds, at every start
    return subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
