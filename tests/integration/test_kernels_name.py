"""Our room `kernels` bears the name of a package that transformers probes for; both must be importable together.

transformers reads the version of a distribution called `kernels` and imports it if the version lies in its window. Ours
has no such distribution, no `__version__` and nothing heavy in its `__init__`: see pyproject.toml.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
import kernels
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import kernels.paged_attention
print(Path(kernels.__file__).parent, hasattr(kernels, "__version__"), len(tokenizer) == model.config.vocab_size)
"""


def test_transformers_loads_a_model_beside_our_kernels(tiny_models: dict[str, Path]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_models["llama"])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(ROOT / "kernels"), "False", "True"]


def test_no_distribution_called_kernels_is_installed() -> None:
    with pytest.raises(PackageNotFoundError):
        version("kernels")


def test_importing_our_kernels_imports_no_library() -> None:
    program = "import kernels, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "False"]
