"""Sixteen float32 in a register, pairs of bfloat16, and the tiles of AMX: the words that numba's kernels are made of.

A word here is an instruction or a few. None may be reordered, fused or split by the compiler: no `fastmath` is given,
a product and a sum are one rounding only where `fused` says so, and what is added up across lanes is added in the order
that stands below. So the bits of a kernel follow from its text, whichever loops LLVM unrolls. Memory is addressed by
integers, as `Tensor.data_ptr()` gives them, and nobody checks them here: a kernel's public function does.

Imported only where numba is; see engine/models/compiled.py.

Source: Intel, Architecture Instruction Set Extensions, 2023, chapter 3 (AMX); LLVM Language Reference, 2025.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import torch
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from kernels.compilation import part

LANES = 16
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_LONG, _BYTE = ir.IntType(64), ir.IntType(8)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)  # bfloat16, as its bits
_NOTHING = ir.VoidType()

Emit = Callable[..., Any]  # an LLVM builder and the values of the arguments → the value of the result, or None


def instruction(function: Callable[..., Any]) -> Any:
    """Return a word of numba's. It has no types for its own."""
    return intrinsic(function)


def instruction_by_number(function: Callable[..., Any]) -> Any:
    """Return a word one of whose arguments is part of the instruction, so it must be a constant."""
    return intrinsic(prefer_literal=True)(function)


def bits_of(number: float) -> int:
    """Return what `number_at` reads as a number of float32."""
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


@cache
def has_pairs() -> bool:
    """Return whether this CPU multiplies pairs of bfloat16, sixteen at once. Then it has every word here but tiles."""
    features = binding.get_host_cpu_features()
    return not numba.config.DISABLE_JIT and bool(features.get("avx512bf16") and features.get("avx512f"))


@cache
def has_tiles() -> bool:
    """Return whether this CPU and its system have AMX for bfloat16, which this process may use from here on."""
    return has_pairs() and bool(binding.get_host_cpu_features().get("amx-bf16") and torch.cpu._init_amx())


TILES = has_tiles()  # how kernels multiply where they are not told


class _Sixteen(types.Type):
    def __init__(self) -> None:
        super().__init__(name="sixteen")


_sixteen = _Sixteen()
_address, _integer, _number = types.int64, types.int64, types.float32


@register_model(_Sixteen)
class _SixteenModel(models.PrimitiveModel):  # type: ignore[misc]  # numba has no types
    def __init__(self, manager: Any, front_end: Any) -> None:
        super().__init__(manager, front_end, _FLOATS)


def _word(result: Any, arguments: tuple[Any, ...], emit: Emit) -> Any:
    """Return what numba wants of an intrinsic: its signature and its code."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = emit(builder, *values)
        return context.get_dummy_value() if value is None else value

    return result(*arguments), code


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _same(value: float, kind: Any = _FLOATS) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, _same(0, _INTS))


def _read(builder: Any, address: Any, kind: Any, align: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _write(builder: Any, address: Any, value: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


# Numbers and integers in memory.


@instruction
def integer_at(_: Any, address: Any) -> Any:
    """int64."""
    return _word(_integer, (_address,), lambda b, at: _read(b, at, _LONG, 8))


@instruction
def put_integer(_: Any, address: Any, value: Any) -> Any:
    return _word(types.none, (_address, _integer), lambda b, at, value: _write(b, at, value, 8))


@instruction
def claim(_: Any, address: Any) -> Any:
    """Return an integer that several threads count up, as it was before this one did."""

    def emit(b: Any, at: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(at, _LONG.as_pointer()), ir.Constant(_LONG, 1), "seq_cst")

    return _word(_integer, (_address,), emit)


@instruction
def number_at(_: Any, address: Any) -> Any:
    """float32."""
    return _word(_number, (_address,), lambda b, at: _read(b, at, _FLOAT, 4))


@instruction
def put_number(_: Any, address: Any, value: Any) -> Any:
    return _word(types.none, (_address, _number), lambda b, at, value: _write(b, at, value, 4))


@instruction
def copy_half(_: Any, to: Any, source: Any) -> Any:
    """One bfloat16."""
    half = ir.IntType(16)
    return _word(types.none, (_address, _address), lambda b, to, source: _write(b, to, _read(b, source, half, 2), 2))


@instruction
def copy_pair(_: Any, to: Any, source: Any) -> Any:
    """Two bfloat16 that lie side by side, at `to` on a boundary of four bytes."""
    return _word(types.none, (_address, _address), lambda b, to, source: _write(b, to, _read(b, source, _INT, 2), 4))


@instruction
def copy_sixteen(_: Any, to: Any, source: Any) -> Any:
    """Sixteen bfloat16."""
    return _word(types.none, (_address, _address), lambda b, to, source: _write(b, to, _read(b, source, _HALVES, 2), 2))


@instruction
def copy_masked(_: Any, to: Any, source: Any, mask: Any) -> Any:
    """Sixteen pairs of bfloat16, of each the bits that `mask` has; its upper half is of the second."""

    def emit(b: Any, to: Any, source: Any, mask: Any) -> None:
        _write(b, to, b.and_(_read(b, source, _INTS, 4), _spread(b, b.trunc(mask, _INT), _INTS)), 4)

    return _word(types.none, (_address, _address, _integer), emit)


@instruction
def prefetch(_: Any, address: Any) -> Any:
    """A hint that the 64 bytes around are wanted soon, in the second cache: the first one waits for too few at once."""

    return _word(types.none, (_address,), lambda b, at: _prefetch(b, b.inttoptr(at, _BYTE.as_pointer()), 2))


# Sixteen at once.


@instruction
def sixteen_at(_: Any, address: Any) -> Any:
    """Of float32."""
    return _word(_sixteen, (_address,), lambda b, at: _read(b, at, _FLOATS, 4))


@instruction
def put_sixteen(_: Any, address: Any, value: Any) -> Any:
    return _word(types.none, (_address, _sixteen), lambda b, at, value: _write(b, at, value, 4))


@instruction
def sixteen_halves_at(_: Any, address: Any) -> Any:
    """Of bfloat16, widened."""

    def emit(b: Any, at: Any) -> Any:
        bits = b.zext(_read(b, at, _HALVES, 2), _INTS)
        return b.bitcast(b.shl(bits, _same(16, _INTS)), _FLOATS)

    return _word(_sixteen, (_address,), emit)


def _nearest(b: Any, value: Any) -> Any:
    """Return the bits of float32 whose upper half is the nearest bfloat16, ties to even. A NaN stays one: every NaN of
    a kernel came of an operation or of a bfloat16, and has no bits so low that they would carry."""
    bits = b.bitcast(value, _INTS)
    odd = b.and_(b.lshr(bits, _same(16, _INTS)), _same(1, _INTS))
    return b.add(b.add(bits, _same(0x7FFF, _INTS)), odd)


@instruction
def rounded(_: Any, value: Any) -> Any:
    """To the nearest bfloat16, still float32."""
    kept = _same(0xFFFF0000, _INTS)
    return _word(_sixteen, (_sixteen,), lambda b, value: b.bitcast(b.and_(_nearest(b, value), kept), _FLOATS))


@instruction
def put_halves(_: Any, address: Any, value: Any) -> Any:
    """Rounded to bfloat16."""

    def emit(b: Any, at: Any, value: Any) -> None:
        _write(b, at, b.trunc(b.lshr(_nearest(b, value), _same(16, _INTS)), _HALVES), 2)

    return _word(types.none, (_address, _sixteen), emit)


@instruction
def fill(_: Any, value: Any) -> Any:
    """The same number in every lane."""
    return _word(_sixteen, (_number,), lambda b, value: _spread(b, value, _FLOATS))


@instruction
def plus(_: Any, left: Any, right: Any) -> Any:
    return _word(_sixteen, (_sixteen, _sixteen), lambda b, left, right: b.fadd(left, right))


@instruction
def minus(_: Any, left: Any, right: Any) -> Any:
    return _word(_sixteen, (_sixteen, _sixteen), lambda b, left, right: b.fsub(left, right))


@instruction
def times(_: Any, left: Any, right: Any) -> Any:
    return _word(_sixteen, (_sixteen, _sixteen), lambda b, left, right: b.fmul(left, right))


@instruction
def over(_: Any, left: Any, right: Any) -> Any:
    return _word(_sixteen, (_sixteen, _sixteen), lambda b, left, right: b.fdiv(left, right))


def _fused(b: Any, left: Any, right: Any, added: Any) -> Any:
    return _call(b, "llvm.fma.v16f32", _FLOATS, left, right, added)


@instruction
def fused(_: Any, left: Any, right: Any, added: Any) -> Any:
    """left · right + added, rounded once."""
    return _word(_sixteen, (_sixteen, _sixteen, _sixteen), _fused)


def _greater(b: Any, left: Any, right: Any) -> Any:
    return b.select(b.fcmp_ordered(">", left, right), left, right)


@instruction
def greater(_: Any, left: Any, right: Any) -> Any:
    """The greater of two, lane by lane; the right one if either is no number."""
    return _word(_sixteen, (_sixteen, _sixteen), _greater)


def _across(b: Any, value: Any, join: Emit) -> Any:
    """Join lane i with lane i + 8, then + 4, + 2, + 1."""
    for distance in (8, 4, 2, 1):
        moved = ir.Constant(_INTS, [(lane + distance) % LANES for lane in range(LANES)])
        value = join(b, value, b.shuffle_vector(value, value, moved))
    return b.extract_element(value, ir.Constant(_INT, 0))


@instruction
def sum_of(_: Any, value: Any) -> Any:
    return _word(_number, (_sixteen,), lambda b, value: _across(b, value, lambda b, x, y: b.fadd(x, y)))


@instruction
def greatest_of(_: Any, value: Any) -> Any:
    return _word(_number, (_sixteen,), lambda b, value: _across(b, value, _greater))


@instruction
def first_of(_: Any, value: Any) -> Any:
    return _word(_number, (_sixteen,), lambda b, value: b.extract_element(value, ir.Constant(_INT, 0)))


@instruction
def only_first(_: Any, value: Any, count: Any) -> Any:
    """Lanes from `count` on are −∞; it may be negative."""

    def emit(b: Any, value: Any, count: Any) -> Any:
        lanes = ir.Constant(_INTS, list(range(LANES)))
        inside = b.icmp_signed("<", lanes, _spread(b, b.trunc(count, _INT), _INTS))
        return b.select(inside, value, _same(float("-inf")))

    return _word(_sixteen, (_sixteen, _integer), emit)


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


# The Taylor series of 2ˣ about 0, from the sixth power down: on [−½, ½] within 2⁻²³ of it, and 1 at 0.
_SERIES = tuple(
    map(
        _float32,
        (
            1.5403530393381609e-4,
            1.3333558146428443e-3,
            9.6181291076284772e-3,
            5.5504108664821580e-2,
            2.4022650695910071e-1,
            6.9314718055994531e-1,
            1.0,
        ),
    )
)
_ROUNDING = 12582912.0  # 1.5 · 2²³: what is added to it is rounded to an integer, in the low bits


@instruction
def power_of_two(_: Any, exponent: Any) -> Any:
    """2 to each exponent: 1 for 0, 0 below −126 and for −∞, ∞ above 127; of what is no number, none."""

    def emit(b: Any, x: Any) -> Any:
        shifted = b.fadd(x, _same(_ROUNDING))
        rest = b.fsub(x, b.fsub(shifted, _same(_ROUNDING)))
        power = _same(_SERIES[0])
        for factor in _SERIES[1:]:
            power = _fused(b, power, rest, _same(factor))
        exponent = b.shl(b.bitcast(shifted, _INTS), _same(23, _INTS))
        power = b.bitcast(b.add(b.bitcast(power, _INTS), exponent), _FLOATS)
        power = b.select(b.fcmp_ordered("<", x, _same(-126.0)), _same(0.0), power)
        return b.select(b.fcmp_ordered(">", x, _same(127.0)), _same(float("inf")), power)

    return _word(_sixteen, (_sixteen,), emit)


# Pairs of bfloat16: what a tile does, a few rows at a time, where there are no tiles.

MOST_ROWS = 8  # with two columns, the sums that registers hold beside what is multiplied


class _Bfloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """What llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_PAIRS = ir.VectorType(_Bfloat(), 2 * LANES)


def _prefetch(b: Any, pointer: Any, nearness: int) -> None:
    hints = (ir.Constant(_INT, value) for value in (0, nearness, 1))  # to be read, how near, data
    _call(b, "llvm.prefetch.p0", _NOTHING, pointer, *hints)


def _pairs_product(b: Any, total: Any, left: Any, right: Any) -> Any:
    """total[n] + left[2n + 1] · right[2n + 1] + left[2n] · right[2n], as the CPU rounds it."""
    return _call(
        b, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, b.bitcast(left, _PAIRS), b.bitcast(right, _PAIRS)
    )


@instruction_by_number
def add_products(
    _: Any, columns: Any, pairs: Any, ahead: Any, sums: Any, left: Any, right: Any, rows: Any, chunks: Any
) -> Any:
    """sums[m, n] += Σ left[m, 2k] · right[k, 2n] + left[m, 2k + 1] · right[k, 2n + 1], of 1 … `MOST_ROWS` rows m.

    In chunks of `pairs` k each, of `columns` times sixteen n, with what lies so many bytes `ahead` on the right side on
    its way, 0 for nothing: three literals. Each of the three sides is (address, bytes from row to row, …); `left` and
    `right` then the bytes from chunk to chunk, `right` last those from one sixteen n to the next. A row's sums are one
    chain of k in ascending order, whatever rows are beside it.
    """
    literals = (columns, pairs, ahead)
    if not all(isinstance(one, types.IntegerLiteral) for one in literals):
        return None
    sizes = [one.literal_value for one in literals]

    def emit(b: Any, _c: Any, _p: Any, _a: Any, sums: Any, left: Any, right: Any, rows: Any, chunks: Any) -> None:
        after = b.append_basic_block("added")
        choice = b.switch(rows, after)
        for count in range(1, MOST_ROWS + 1):
            block = b.append_basic_block(f"rows{count}")
            choice.add_case(ir.Constant(_LONG, count), block)
            b.position_at_end(block)
            _add_products(b, count, sizes, [_unpacked(b, side) for side in (sums, left, right)], chunks)
            b.branch(after)
        b.position_at_end(after)

    sides = [types.containers.UniTuple(_integer, count) for count in (2, 3, 4)]
    return _word(types.none, (*literals, *sides, _integer, _integer), emit)


def _unpacked(b: Any, side: Any) -> list[Any]:
    """Return where a side begins, as LLVM's pointer, and its steps. Of integers it would count up one for each load."""
    begin, *steps = (b.extract_value(side, index) for index in range(side.type.count))
    return [b.inttoptr(begin, _BYTE.as_pointer()), *steps]


def _add_products(b: Any, rows: int, sizes: list[int], sides: list[list[Any]], chunks: Any) -> None:
    (columns, pairs, ahead), (sums, left, right) = sizes, sides

    def at(base: Any, *steps: tuple[Any, int]) -> Any:
        for step, times in steps:
            base = b.gep(base, [b.mul(step, ir.Constant(_LONG, times))])
        return base

    def read(place: Any, kind: Any) -> Any:
        value = b.load(b.bitcast(place, kind.as_pointer()))
        value.align = 4
        return value

    sixteen = ir.Constant(_LONG, 4 * LANES)
    places = [[at(sums[0], (sums[1], row), (sixteen, column)) for column in range(columns)] for row in range(rows)]
    totals = [[cgutils.alloca_once(b, _FLOATS) for _ in line] for line in places]  # LLVM keeps them in registers
    for line, kept in zip(places, totals, strict=True):
        for place, total in zip(line, kept, strict=True):
            b.store(read(place, _FLOATS), total)
    with cgutils.for_range(b, chunks) as loop:
        x = b.gep(left[0], [b.mul(left[2], loop.index)])
        weight = b.gep(right[0], [b.mul(right[2], loop.index)])
        for pair in range(pairs):
            beside = [at(weight, (right[1], pair), (right[3], column)) for column in range(columns)]
            across = [read(place, _INTS) for place in beside]
            for place in beside if ahead else ():
                _prefetch(b, b.gep(place, [ir.Constant(_LONG, ahead)]), 3)
            for row in range(rows):
                one = _spread(b, read(at(x, (left[1], row), (ir.Constant(_LONG, 4), pair)), _INT), _INTS)
                for total, sixteen_pairs in zip(totals[row], across, strict=True):
                    b.store(_pairs_product(b, b.load(total), one, sixteen_pairs), total)
    for line, kept in zip(places, totals, strict=True):
        for place, total in zip(line, kept, strict=True):
            b.store(b.load(total), b.bitcast(place, _FLOATS.as_pointer()), align=4)


# Tiles, by their number: 0 … 7, a literal. A tile has at most 16 rows of 64 bytes; `tile_shapes` says of each how many.


def _tile_call(b: Any, name: str, *values: Any) -> None:
    """LLVM has no code for tiles for a CPU without them: where a kernel would come to them there, it ends."""
    if binding.get_host_cpu_features().get("amx-bf16"):
        _call(b, name, _NOTHING, *values)
    else:
        _call(b, "llvm.trap", _NOTHING)


def _tile_word(name: str, tiles: tuple[Any, ...], others: tuple[Any, ...] = ()) -> Any:
    """Return the code of an instruction on tiles whose other arguments, if any, are an address and a stride."""
    if not all(isinstance(tile, types.IntegerLiteral) for tile in tiles):
        return None
    numbers = [ir.Constant(_BYTE, tile.literal_value) for tile in tiles]

    def emit(b: Any, *values: Any) -> None:
        rest = values[len(tiles) :]
        pointed = (b.inttoptr(rest[0], _BYTE.as_pointer()), *rest[1:]) if rest else ()
        _tile_call(b, name, *numbers, *pointed)

    return _word(types.none, (*tiles, *others), emit)


@instruction_by_number
def tile_zero(_: Any, tile: Any) -> Any:
    return _tile_word("llvm.x86.tilezero", (tile,))


@instruction_by_number
def tile_at(_: Any, tile: Any, address: Any, stride: Any) -> Any:
    """Fill a tile from rows that begin `stride` bytes after each other."""
    return _tile_word("llvm.x86.tileloadd64", (tile,), (_address, _integer))


@instruction_by_number
def put_tile(_: Any, tile: Any, address: Any, stride: Any) -> Any:
    return _tile_word("llvm.x86.tilestored64", (tile,), (_address, _integer))


@instruction_by_number
def tile_product(_: Any, total: Any, left: Any, right: Any) -> Any:
    """total[m, n] += Σₖ left[m, 2k] · right[k, 2n] + left[m, 2k + 1] · right[k, 2n + 1]; `total` is float32."""
    return _tile_word("llvm.x86.tdpbf16ps", (total, left, right))


@instruction
def tile_shapes(_: Any, address: Any) -> Any:
    """Take the shapes of all tiles from 64 bytes."""
    pointer = _BYTE.as_pointer()
    return _word(types.none, (_address,), lambda b, at: _tile_call(b, "llvm.x86.ldtilecfg", b.inttoptr(at, pointer)))


@instruction
def put_tile_shapes(_: Any, address: Any) -> Any:
    pointer = _BYTE.as_pointer()
    return _word(types.none, (_address,), lambda b, at: _tile_call(b, "llvm.x86.sttilecfg", b.inttoptr(at, pointer)))


@instruction
def tile_release(_: Any) -> Any:
    """Have no tiles, which makes it cheaper to switch threads."""
    return _word(types.none, (), lambda b: _tile_call(b, "llvm.x86.tilerelease"))


SHAPES_BYTES = 128  # of a workspace: the shapes that a kernel has, and those that the thread had before


@part
def take_tiles(at: int, first_bytes: int, last_bytes: int, rows: int) -> None:
    """Have tiles of these shapes: bytes of a row of tiles 0 … 3 and 4 … 7, 16 bits each; rows of all, 8 bits each."""
    put_tile_shapes(at + 64)
    for word in range(0, 64, 8):
        put_integer(at + word, 0)
    put_integer(at, 1)  # the palette
    put_integer(at + 16, first_bytes)
    put_integer(at + 24, last_bytes)
    put_integer(at + 48, rows)
    tile_shapes(at)


@part
def give_tiles_back(at: int) -> None:
    """What a library in this thread had set stands again."""
    if integer_at(at + 64) & 0xFF:
        tile_shapes(at + 64)
    else:
        tile_release()
