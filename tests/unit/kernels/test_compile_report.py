"""What compiling for Hopper can prove without one: no kernel of the launch table spills, prefill reaches wgmma."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton on this system")

from kernels.launch import TABLE, Entry

pytestmark = pytest.mark.timeout(900)  # a process of its own, on a machine that may be slow
ROOT = Path(__file__).parents[3]
MOST_SHARED = 232_448  # bytes of one program on sm_90


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The report of a process of its own: this one may have been told to interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.support.compile_report", "--json"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_no_kernel_spills_or_takes_more_than_there_is(report: list[dict[str, Any]]) -> None:
    assert [used for used in report if used["stack"] or used["shared"] > MOST_SHARED] == []


def test_prefill_reaches_the_matrix_units_of_a_warp_group(report: list[dict[str, Any]]) -> None:
    prefill = [used for used in report if used["operation"].startswith("prefill_attention")]
    assert len(prefill) > 5
    assert [used for used in prefill if not used["wgmma"]] == []


def test_no_sum_of_attention_takes_a_product_in_where_the_other_kernel_might_not(report: list[dict[str, Any]]) -> None:
    assert [used for used in report if "attention" in used["operation"] and used["contracted"]] == []


def test_products_of_many_rows_reach_them_too_and_round_gate_and_up_apart(report: list[dict[str, Any]]) -> None:
    products = [used for used in report if used["operation"].startswith("gemm")]
    assert {used["wgmma"] for used in products if used["size"] >= 64} == {True}
    assert [used for used in products if used["contracted"]] == []


def test_every_kernel_was_compiled_and_for_every_entry_of_the_table(report: list[dict[str, Any]]) -> None:
    def chosen(used: dict[str, Any]) -> Entry:
        return next(e for e in TABLE if e.operation == used["operation"] and used["size"] <= e.at_most)

    compiled = {chosen(used) for used in report}
    assert [entry for entry in TABLE if entry not in compiled] == []
    sources = [file.read_text() for file in (ROOT / "kernels").glob("*.py")]
    kernels = {name for source in sources for name in re.findall(r"^@jit\ndef (\w+_kernel)\(", source, re.MULTILINE)}
    assert kernels == {used["kernel"] for used in report}
