"""What the launchers hand over is what their kernels were compiled for: a GPU would refuse what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this system")

pytestmark = pytest.mark.timeout(900)  # a process of its own, on a machine that may be slow
ROOT = Path(__file__).parents[3]
KERNELS = {"_rms_norm", "_silu_mul", "_rope_store", "_decode", "_merge", "_prefill"}
KERNELS |= {"_gemm", "_grouped", "_group", "_route", "_combine", "_cut", "_draw", "_best", "_part", "_whole"}
KERNELS |= {"_prepare", "_advance"}


def test_every_launch_hands_over_what_its_kernel_takes(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.support.launches"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert {line.split("_kernel ")[0] for line in ended.stdout.splitlines()} == KERNELS
