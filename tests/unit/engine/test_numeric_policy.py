from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from engine.config import KV_CACHE_DTYPES
from engine.numeric_policy import ARITHMETIC, digest, numeric_policy, with_kv_cache

ROOT = Path(__file__).parents[3]
LINEARS = {(64, 64): "library", (64, 688): "fixed_tiles"}


def test_the_digest_is_that_of_canonical_json() -> None:
    assert digest({"b": 1, "a": {"y": 2, "x": "ü"}}) == digest({"a": {"x": "ü", "y": 2}, "b": 1})
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest(numeric_policy(LINEARS, "fused")))


def test_everything_that_was_chosen_is_in_it() -> None:
    base = numeric_policy(LINEARS, "fused")
    assert digest(base) == digest(numeric_policy(dict(reversed(LINEARS.items())), "fused"))
    others = [numeric_policy(LINEARS, "tiled"), numeric_policy({**LINEARS, (64, 64): "fixed_tiles"}, "fused")]
    assert len({digest(policy) for policy in (base, *others)}) == 3


def test_how_keys_and_values_are_kept_is_in_it() -> None:
    base = numeric_policy(LINEARS, "fused")
    assert len({digest(base), *(digest(with_kv_cache(base, dtype)) for dtype in KV_CACHE_DTYPES)}) == 3


def test_the_number_of_threads_is_in_it() -> None:
    before, threads = numeric_policy(LINEARS, "fused"), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert numeric_policy(LINEARS, "fused") != before
    finally:
        torch.set_num_threads(threads)


def test_what_a_program_around_the_engine_sets_for_its_arithmetic_is_in_it() -> None:
    before = numeric_policy(LINEARS, "tiled")
    torch.set_float32_matmul_precision("medium")  # products of float32 may be of bfloat16 then
    try:
        assert numeric_policy(LINEARS, "tiled") != before
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)
    try:
        assert numeric_policy(LINEARS, "tiled") != before
    finally:
        torch.set_flush_denormal(False)
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        assert numeric_policy(LINEARS, "tiled") != before
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)
    assert numeric_policy(LINEARS, "tiled") == before


def test_every_file_of_the_engine_that_touches_numbers_is_digested_or_known_to_decide_no_bit() -> None:
    decides_none = {"load.py", "model.py", "model_loading.py", "numeric_policy.py", "operations.py", "probe.py"}
    touching = {
        file.name
        for folder in ("engine", "engine/models")
        for file in (ROOT / folder).glob("*.py")
        if re.search("^(import|from) (torch|numpy)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert touching - decides_none <= ARITHMETIC
    # Where a token stands, which may not be drawn there, and which keys a family's layers see:
    assert {"plan.py", "sequence.py", "borrowed_config.py"} <= ARITHMETIC
    assert {
        name for name in ARITHMETIC if not any((ROOT / at / name).is_file() for at in ("engine", "engine/models"))
    } == set()


def test_two_processes_agree_and_a_switch_of_the_libraries_shows() -> None:
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from engine.numeric_policy import digest, numeric_policy\n"
        "import json; policy = numeric_policy({(64, 64): 'library'}, 'fused')\n"
        "print(json.dumps([digest(policy), policy['environment']]))"
    )

    def run(**switch: str) -> tuple[str, dict[str, str]]:
        environment = {"PATH": "/usr/bin:/bin", **switch}
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        read: tuple[str, dict[str, str]] = tuple(json.loads(ended.stdout))
        return read

    first = run()
    assert first == run()
    switched = run(ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    assert switched[1] == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    assert switched[0] != first[0]
