"""What a GPU without a GPU would get: every kernel of the launch table compiled for Hopper, its resources read back.

    python -m tests.support.compile_report          one line each
    python -m tests.support.compile_report --json   one object each, for example

    {"operation": "rms_norm", "size": 4096, "label": "4096 *bf16", "kernel": "_rms_norm_kernel", "registers": 32,
     "stack": 0, "shared": 32, "wgmma": false, "contracted": 0}

`registers` are those of a thread, at most 255, and `stack` its bytes of local memory: anything but 0 means that
registers spilled. `shared` is the bytes of a program, at most 232,448, and `contracted` counts the sums that took a
product in, which rounds once where two instructions round twice. Needs no driver: the assembler comes with Triton. Not
for a process with TRITON_INTERPRET, where nothing is compiled. A case says how its launcher would call the kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention_state import SEGMENT, TILE
from kernels.decode_attention import _decode_kernel, _merge_kernel
from kernels.experts import _combine_kernel
from kernels.gemm import _gemm_kernel, columns_of, step_of
from kernels.grouped import _group_kernel, _grouped_kernel
from kernels.jit import INTERPRETED
from kernels.launch import Launch, launch_for, power_of_two
from kernels.logprobs import _part_kernel, _whole_kernel
from kernels.prefill_attention import _prefill_kernel
from kernels.prepare import _advance_kernel, _prepare_kernel
from kernels.rms_norm import _rms_norm_kernel
from kernels.rope_store import _rope_store_kernel
from kernels.route import _route_kernel
from kernels.sample import PART, _best_kernel, _cut_kernel, _draw_kernel
from kernels.silu_mul import _silu_mul_kernel

HOPPER = GPUTarget("cuda", 90, 32)
DEVICE = "sm_90"
ATTENTION = {
    "decode_attention": _decode_kernel,
    "merge_attention": _merge_kernel,
    "prefill_attention": _prefill_kernel,
    "decode_attention_float8": _decode_kernel,
    "prefill_attention_float8": _prefill_kernel,
}
VARIANT_TYPES = {"window": "i32", "soft_cap": "fp32", "sinks": "*fp32", "arrived": "*i32"}
VARIANTS = ((), ("soft_cap",), ("window", "sinks"), tuple(VARIANT_TYPES))
FLOAT8 = "*fp8e4nv"  # of a cache


@dataclass(frozen=True, slots=True)
class Case:
    operation: str  # as in the launch table
    size: int  # likewise
    label: str
    kernel: Any
    types: Mapping[str, str]  # `*bf16` … of each argument that is neither a constant nor None
    constants: Mapping[str, Any]

    @property
    def launch(self) -> Launch:
        return launch_for(self.operation, self.size, DEVICE)


@dataclass(frozen=True, slots=True)
class Resources:
    operation: str
    size: int
    label: str
    kernel: str
    registers: int
    stack: int
    shared: int
    wgmma: bool
    contracted: int


def cases() -> Iterator[Case]:
    yield from _norms()
    yield from _ropes()
    yield from _gates()
    yield from _attentions()
    yield from _gemms()
    yield from _samples()
    yield from _logprobs()
    yield from _groups()
    yield from _steps()


def _norms() -> Iterator[Case]:
    for width in (896, 1024, 4096, 8192, 32768):
        for dtype in ("*bf16", "*fp16"):
            types = dict.fromkeys(("x", "weight", "out"), dtype) | {"epsilon": "fp32"}
            constants = {"WIDTH": width, "BLOCK": power_of_two(width), "PLAIN": False}
            yield Case("rms_norm", width, f"{width} {dtype}", _rms_norm_kernel, types, constants)
            types = types | {"residual": dtype, "added": dtype}
            yield Case("rms_norm", width, f"{width} {dtype} residual", _rms_norm_kernel, types, constants)


def _ropes() -> Iterator[Case]:
    for size, dtype in ((64, "*bf16"), (80, "*bf16"), (96, "*fp16"), (128, "*bf16"), (256, "*bf16")):
        types = dict.fromkeys(("qkv", "query", "key_cache", "value_cache"), dtype)
        types |= {"epsilon": "fp32", "cos": "*fp32", "sin": "*fp32", "positions": "*i64", "slots": "*i64"}
        constants = {"HEADS": 32, "GROUPS": 8, "HALF": size // 2, "BLOCK": power_of_two(size // 2), "PLAIN": False}
        constants["ROWS"] = launch_for("rope_store", size, DEVICE).block_m
        yield Case("rope_store", size, f"{size}", _rope_store_kernel, types, constants)
        types = types | {"query_norm": dtype, "key_norm": dtype}
        yield Case("rope_store", size, f"{size} normed", _rope_store_kernel, types, constants)
        types = types | dict.fromkeys(("key_cache", "value_cache"), FLOAT8)
        yield Case("rope_store", size, f"{size} normed {FLOAT8}", _rope_store_kernel, types, constants)


def _gates() -> Iterator[Case]:
    for width, dtype in ((3072, "*fp16"), (12288, "*bf16")):
        types = dict.fromkeys(("gate_up", "out"), dtype)
        constants = {"WIDTH": width, "BLOCK": launch_for("silu_mul", width, DEVICE).block_n, "PLAIN": False}
        yield Case("silu_mul", width, f"{width}", _silu_mul_kernel, types, constants)


def _attentions() -> Iterator[Case]:
    layouts = ((64, 7, "*bf16"), (80, 1, "*bf16"), (96, 3, "*fp16"), (128, 4, "*bf16"), (256, 16, "*bf16"))
    for (size, ratio, dtype), (operation, kernel) in product(layouts, ATTENTION.items()):
        of_cache = FLOAT8 if operation.endswith("float8") else dtype
        launch = launch_for(operation, size, DEVICE)
        constants = {"GROUPS": 8, "RATIO": ratio, "SIZE": size, "BLOCK_D": power_of_two(size), "SEGMENT": SEGMENT}
        constants |= {"PAGE": 16, "TILE": TILE, "PLAIN": False, "BLOCK_R": power_of_two(ratio, least=1)}
        constants |= {"BLOCK_M": launch.block_m, "BLOCK_V": min(power_of_two(size), launch.block_n)}
        types = dict.fromkeys(("query", "out"), dtype) | dict.fromkeys(("key_cache", "value_cache"), of_cache)
        types |= dict.fromkeys(("block_table", "starts", "context_len"), "*i32") | {"states": "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(("sequences", "table_width", "segments"), "i32")
        for names in VARIANTS if of_cache == dtype else VARIANTS[-1:]:
            given = types | {name: VARIANT_TYPES[name] for name in names}
            label = " ".join((f"{size} × {ratio} {dtype}", *names))
            yield _case(operation, size, label, kernel, given, constants)


def _case(
    operation: str, size: int, label: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]
) -> Case:
    """Return a case of the arguments that `kernel` has."""
    of_kernel = [{name: given[name] for name in kernel.arg_names if name in given} for given in (types, constants)]
    return Case(operation, size, label, kernel, *of_kernel)


def _gemms() -> Iterator[Case]:
    for operation, rows in (*(("gemm", rows) for rows in (16, 32, 64, 2048)), ("gemm_one_tile", 2048)):
        launch = launch_for(operation, rows, DEVICE)
        for silu, width, depth, dtype in (
            (False, 4096, 12288, "*bf16"),
            (False, 1003, 1000, "*fp16"),
            (True, 12288, 4096, "*bf16"),
        ):
            types = dict.fromkeys(("x", "weight", "out"), dtype) | {"rows": "i32"}
            types |= {} if silu else {"bias": dtype}
            blocks = {"BLOCK_M": launch.block_m, "BLOCK_K": step_of(launch, depth), "PLAIN": False}
            blocks["BLOCK_N"] = columns_of(launch, width, -(-rows // launch.block_m), silu)
            constants = {"WIDTH": width, "DEPTH": depth, "SILU": silu, **blocks}
            label = f"{rows} × {width} × {depth}{' silu' if silu else ''}"
            yield Case(operation, rows, label, _gemm_kernel, types, constants)


def _samples() -> Iterator[Case]:
    width = 151_936
    parts = -(-width // PART)
    score = {"logits": "*fp32", "request": "*i32", "temperature": "*fp64"}
    wishes = {"bias_ids": "*i32", "biases": "*fp64", "history": "*i32", "mask": "*i32"}
    wishes |= dict.fromkeys(("repetition", "frequency", "presence"), "*fp64")
    cut = {"min_p": "*fp64", "edge": "*i64", "last": "*i32", "best": "*fp64"}
    part = {"values": "*fp64", "ids": "*i32"}
    drawn = {"seed": "*i64", "position": "*i64", **part}
    constants = {"WIDTH": width, "BLOCK": launch_for("sample", width, DEVICE).block_n}
    few, many = {**constants, "BIASES": 1, "BIAS_BLOCK": 1}, {**constants, "BIASES": 300, "BIAS_BLOCK": 512}
    parted = {"PARTS": parts, "PART_WIDTH": PART}
    ranked = {"top_k": "*i32", "top_p": "*fp64", **cut}
    yield Case("sample", width, "cut", _cut_kernel, score | ranked, few)
    yield Case("sample", width, "cut, every wish", _cut_kernel, score | wishes | ranked, many)
    yield Case("sample", width, "draw", _draw_kernel, score | drawn, few | parted)
    yield Case("sample", width, "draw, every wish", _draw_kernel, score | wishes | drawn | cut, many | parted)
    merged = {"PARTS": parts, "WIDTH": width, "BLOCK": power_of_two(parts)}
    yield Case("sample", width, "best", _best_kernel, part | {"tokens": "*i64"}, merged)


def _logprobs() -> Iterator[Case]:
    width = 151_936
    block = launch_for("logprobs", width, DEVICE).block_n
    parts = -(-width // block)
    found = {"sums": "*fp32", "best": "*fp32", "best_ids": "*i32", "logits": "*fp32"}
    answer = {"tokens": "*i64", "selected": "*fp32", "top_ids": "*i32", "top": "*fp32"}
    for count in (0, 20, 32):
        kept = max(1, count)
        constants = {"WIDTH": width, "PARTS": parts, "KEPT": kept}
        yield Case("logprobs", width, f"parts, {count} likeliest", _part_kernel, found, constants | {"BLOCK": block})
        constants |= {"ALTERNATIVES": count, "PART_BLOCK": power_of_two(parts), "BLOCK": power_of_two(parts * kept)}
        yield Case("logprobs", width, f"whole, {count} likeliest", _whole_kernel, found | answer, constants)


def _groups() -> Iterator[Case]:
    for rows, count, width, depth, mode in (  # rows of a group on average
        (1, 128, 768, 2048, "silu"),
        (16, 128, 2048, 768, "choices"),
        (64, 128, 768, 2048, "silu"),
        (2048, 8, 4096, 14336, "choices"),
        (2048, 8, 14336, 4096, "silu"),
        (2, 64, 16, 4096, "shrink"),
        (2, 64, 6144, 16, "add"),
        (512, 4, 6144, 64, "add"),
    ):
        launch = launch_for("gemm", rows, DEVICE)
        types = dict.fromkeys(("x", "weight", "out"), "*bf16") | {"order": "*i64", "starts": "*i32", "tiles": "i32"}
        blocks = {"BLOCK_M": launch.block_m, "BLOCK_K": step_of(launch, depth), "PLAIN": False}
        blocks["BLOCK_N"] = columns_of(launch, width, count, mode == "silu")
        constants = {"CHOICES": 8 if mode == "silu" else 1, "SILU": mode == "silu", "ADD": mode == "add"}
        constants |= {"COUNT": count, "GROUPS": power_of_two(count), "WIDTH": width, "DEPTH": depth, **blocks}
        yield Case("gemm", rows, f"{rows} of {count} × {width} × {depth} {mode}", _grouped_kernel, types, constants)
    for count, choices in ((8, 2), (128, 8), (1024, 32)):
        blocks = {"BLOCK": power_of_two(count), "CHOICE_BLOCK": power_of_two(choices)}
        constants = {"COUNT": count, "CHOICES": choices, "OVER_CHOSEN": count == 8, **blocks}
        types = {"scores": "*bf16", "chosen": "*i64", "weights": "*fp32"}
        yield Case("route", count, f"{choices} of {count}", _route_kernel, types, constants)
    constants = {"BLOCK": launch_for("grouped", 128, DEVICE).block_n}
    types = {"group_of": "*i64", "order": "*i64", "starts": "*i32", "rows": "i32"}
    yield Case("grouped", 128, "rows by group", _group_kernel, types, constants)
    types = {"outputs": "*bf16", "weights": "*fp32", "out": "*bf16"}
    constants = {"CHOICES": 8, "WIDTH": 4096, "BLOCK": launch_for("experts", 4096, DEVICE).block_n, "PLAIN": False}
    yield Case("experts", 4096, "combine", _combine_kernel, types, constants)


def _steps() -> Iterator[Case]:
    constants = {"BLOCK": launch_for("prepare", 8192, DEVICE).block_m}
    tables = dict.fromkeys(("known", "computed", "sequence", "starts"), "*i32") | {"most_tokens": "i32"}
    read = {"block_table": "*i32", "context": "*i32"} | dict.fromkeys(("token_out", "position_out", "slot_out"), "*i64")
    read |= dict.fromkeys(("tokens", "sequences", "table_width", "spare_slot"), "i32")
    halved = {"PAGE": 16, "HALVINGS": 8}
    yield Case("prepare", 8192, "inputs", _prepare_kernel, tables | read, constants | halved)
    drawn = {"length": "*i32", "history": "*i32", "drawing": "*i32", "drawn": "*i64", "sequences": "i32", "rows": "i32"}
    yield Case("prepare", 256, "advance", _advance_kernel, tables | drawn, constants | {"VOCABULARY": 151_936})


def compile_case(case: Case) -> Resources:
    """Compile one case as its launcher would have it compiled. Pointers are taken to be aligned to 16 bytes."""
    names = case.kernel.arg_names
    given = {**dict.fromkeys(names), **case.constants}
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in given.items() if name not in case.types},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name, type_ in case.types.items() if type_[0] == "*"
        },
    )
    compiled = triton.compile(source, target=HOPPER, options=case.launch.options)
    registers, stack = _usage(compiled.asm["cubin"])
    text = compiled.asm["ptx"]
    wgmma, contracted = "wgmma.mma_async" in text, text.count("fma.rn")
    shared = compiled.metadata.shared
    named = (case.operation, case.size, case.label, case.kernel.__name__)
    return Resources(*named, registers, stack, shared, wgmma, contracted)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and its bytes of stack and local memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return found["REG"], found["STACK"] + found["LOCAL"]


def main(arguments: list[str]) -> None:
    if INTERPRETED:
        raise SystemExit("unset `TRITON_INTERPRET`: the interpreter compiles nothing")
    for case in cases():
        used = compile_case(case)
        if "--json" in arguments:
            print(json.dumps(asdict(used)), flush=True)
        else:
            spills = "no spills" if used.stack == 0 else f"{used.stack} bytes spilled"
            kind = ", wgmma" if used.wgmma else ""
            figures = f"{used.registers:3} registers, {spills}, {used.shared:6} bytes shared{kind}"
            print(f"{used.operation:18} {used.label:28} {figures}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
