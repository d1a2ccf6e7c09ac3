"""Every test of tests/gpu, walked through by Triton's interpreter: it must be asked for before a kernel is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# That of 3.6 turns arrays of one element into numbers, which numpy no longer does.
pytest.importorskip("triton", minversion="3.7", reason="no Triton here whose interpreter walks loops")

pytestmark = pytest.mark.timeout(1800)  # a process of its own, on a machine that may be slow
ROOT = Path(__file__).parents[3]


def test_the_kernels_hold_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    last = ended.stdout.splitlines()[-1]
    assert " passed" in last, last
