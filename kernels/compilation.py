"""Functions of words (lanes.py) → LLVM's text, by numba → code for this CPU, in this process.

numba needs seconds for the first step, LLVM a tenth of one for the second. The text is kept from one start to the next
(kept_text.py) under a name made of all it follows from: the sources of kernels/, the function's own, what it encloses,
Python, numba, LLVM and the CPU. numba's own cache would not do: it knows the file of a kernel and not the words in it.

Whether a text was kept or has just been written, what runs is made from it here: there is one way to a kernel's code.
Imported only where numba is; see engine/models/compiled.py.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba.core import types

from kernels.kept_text import KeptText, kept_by_this_user

_OPTIONS = {"boundscheck": False, "error_model": "numpy"}
_held: list[Any] = []


def part(function: Callable[..., Any]) -> Any:
    """Return `function` as a part of kernels, put in where it is called: what is constant there is constant in it."""
    wrapped = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(**_OPTIONS, **wrapped, forceinline=True)(function)


def compiled(function: Callable[[int], None], kept: KeptText | None = None) -> int:
    """Return the address of `function`, compiled: of the address of its arguments. See team.py for who runs it.

    What it encloses must be integers. It is never taken out of memory again.

    Raises:
        TypeError: it encloses something else.
    """
    kept, name = kept or kept_by_this_user(), _name(function)
    text = kept.read(name)
    if text is None:
        text = str(numba.cfunc(types.void(types.int64), **_OPTIONS)(function).inspect_llvm())
        kept.keep(name, text)
    return _load(text)


def _load(text: str) -> int:
    module = binding.parse_assembly(text)
    here = (function.name for function in module.functions if not function.is_declaration)
    (entry,) = (name for name in here if name.startswith("cfunc."))
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static",
        codemodel="jitdefault",
        jit=True,
    )
    engine = binding.create_mcjit_compiler(module, machine)  # one a kernel: names of two processes' texts may be equal
    engine.finalize_object()
    _held.append(engine)
    return int(engine.get_function_address(entry))


def _name(function: Callable[[int], None]) -> str:
    enclosed = inspect.getclosurevars(function).nonlocals
    if not all(type(value) is int for value in enclosed.values()):
        raise TypeError(f"`{function.__qualname__}` encloses more than integers: {', '.join(enclosed)}")
    own = hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    settings = sorted(f"{key}={value}" for key, value in os.environ.items() if key.startswith("NUMBA_"))
    made_of = [function.__qualname__, enclosed, own, settings, *_surroundings()]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


@cache
def _surroundings() -> tuple[str, ...]:
    """Return what every kernel's text follows from."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return (
        *(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sources),
        sys.version,
        numba.__version__,
        llvmlite.__version__,
        ".".join(map(str, binding.llvm_version_info)),
        binding.get_default_triple(),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    )
