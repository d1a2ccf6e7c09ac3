"""The demo's walk: it holds on a gateway that keeps its promises, and names the step where one does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from gateway.app import create_app
from gateway.cli import app as cli
from gateway.demo import model_directory
from gateway.demo.walk import CARD, EMAIL, run_demo
from gateway.officer_client import answers
from gateway.settings import Settings, load_settings
from tests.support.scripted_engine import ScriptedEngine
from tests.support.server import free_port

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "PROBITY_ENGINE_KERNELS": "library"}  # compiling takes seconds

needs_model = pytest.mark.skipif(
    not (model_directory() / "config.json").exists(), reason="the bundled model is not in this checkout"
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gateway.cli", *arguments]


def reply(prompt: str) -> str:
    return f"The test card number is {CARD}." if "test card" in prompt else "Opening an account takes five steps."


def demo_app(data: Path, engine: ScriptedEngine) -> tuple[Settings, FastAPI]:
    settings = load_settings(None, {}, {"data_dir": str(data), "server.port": 0, "audit.low_water_mib": 1})
    return settings, create_app(settings, engine=engine)


def test_every_step_holds_and_a_second_walk_finds_the_policies_in_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(reply, chunk=3)
    settings, app = demo_app(tmp_path, engine)
    assert run_demo(settings, once=True, app=app)
    first = capsys.readouterr().out
    assert first.count("   held") == 7
    assert "put in force: org-floor, acme-bank, globex-health" in first
    assert "delivered: The test card number is [CARD]." in first
    assert "Traceback" not in first
    assert "\x1b[" not in first  # nobody watches: plain
    settings, app = demo_app(tmp_path, ScriptedEngine(reply, chunk=3))
    assert run_demo(settings, once=True, app=app)
    assert "put in force: none" in capsys.readouterr().out
    assert not [prompt for prompt in engine.prompts if CARD in prompt or EMAIL in prompt]


def test_an_answer_that_cannot_be_repeated_fails_its_step_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = iter(range(1000))
    settings, app = demo_app(tmp_path, ScriptedEngine(lambda prompt: f"answer number {next(count)}"))
    assert not run_demo(settings, once=True, app=app)
    told = capsys.readouterr().out
    assert "FAILED: The answer is generated again, bit for bit: the replay is different" in told
    assert "\n7. " not in told  # the walk ends there


@needs_model
def test_the_demo_command_holds_on_the_bundled_model(tmp_path: Path) -> None:
    ended = subprocess.run(
        command("demo", "--once", "--data", str(tmp_path / "data"), "--port", "0"),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("   held") == 7


@needs_model
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_drains_and_ends_well_when_it_is_told_to(tmp_path: Path, how: signal.Signals) -> None:
    port = free_port()
    serving = subprocess.Popen(
        command("serve", "--data", str(tmp_path / "data"), "--port", str(port)),
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not answers(f"http://127.0.0.1:{port}"):
            assert serving.poll() is None, serving.stderr.read() if serving.stderr else ""
            time.sleep(0.05)
        serving.send_signal(how)
        _, told = serving.communicate(timeout=60)
    finally:
        serving.kill()
    assert serving.returncode == 0, told
    verified = CliRunner().invoke(cli, ["audit", "verify", "--data", str(tmp_path / "data")])
    assert verified.exit_code == 0, verified.output
