"""A step's inputs from what lies on the device, and what a step leaves there: the host sends which sequences and how
many tokens of each, nothing else.

    tokens       [5 9 7 | 4 · ·]      of sequence 0, all three known; of sequence 1, one
    computed     [  1   |  0  ]       keys and values of so many lie in their blocks
    step         sequence [0 1], starts [0 2 3]: two tokens of sequence 0, one of sequence 1
    → tokens [9 7 4], positions [1 2 0], slots of those positions, context lengths [3 1]

Then a token is drawn for each: it is appended, `computed` goes on, and what penalties look at is counted. A step that
is shorter than the tensors it writes (a captured graph has one size) is filled up with tokens at position 0 whose keys
and values go to a slot that is nobody's.

Numeric contract: whole numbers, exact; the kernels equal the plain versions. A program finds the sequence of its tokens
by binary search, so that the host is not asked. Knows no sequence but by its row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.jit import Pointer, jit, tl
from kernels.launch import device_of, launch_for, power_of_two
from kernels.shape import ShapeError, check_layout, check_shape


@dataclass(frozen=True, slots=True)
class SequenceTables:
    """What is known of S sequences. Changed in place by `advance`, and by the host when one begins or ends."""

    tokens: Tensor  # [S, L] int32  prompt and output, so far as they are known
    length: Tensor  # [S] int32  how many are known, ≤ L
    computed: Tensor  # [S] int32  of how many keys and values are stored, ≤ length
    block_table: Tensor  # [S, W] int32  block ids
    history: Tensor | None = (
        None  # [S, V] int32  2 · (times in the output) + (1 if in the prompt), as sample.py reads it
    )


@dataclass(frozen=True, slots=True)
class Step:
    """Which tokens are computed: of Q sequences the next few each."""

    sequence: Tensor  # [Q] int32  row of the tables, none twice among those that have tokens
    starts: Tensor  # [Q + 1] int32  ascending from 0: sequence q has tokens starts[q] … starts[q + 1] − 1 of the step


@dataclass(frozen=True, slots=True)
class StepTensors:
    """T tokens; those from starts[Q] on fill up: token 0 at position 0 into the spare slot."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64  block · P + offset
    context: Tensor  # [Q] int32  tokens of each sequence, those of this step included


def prepare(
    tables: SequenceTables,
    step: Step,
    count: int,  # T, ≥ starts[Q]
    page: int,  # P, tokens of a block
    spare_slot: int,  # for what fills up
) -> StepTensors:
    """Return the inputs of a step.

    Raises:
        ShapeError: an argument disagrees with the shapes above.
    """
    _check(tables, step)
    if step.sequence.is_cuda:
        return prepare_triton(tables, step, count, page, spare_slot)
    index = torch.arange(count)
    taken = (step.starts[1:] - step.starts[:-1]).long()
    place = torch.searchsorted(step.starts[1:].contiguous(), index.int(), right=True).clamp(max=len(taken) - 1)
    real = index < step.starts[-1]
    of = step.sequence[place].long()
    positions = torch.where(real, tables.computed[of] + index - step.starts[place], 0)
    slots = tables.block_table[of, positions // page].long() * page + positions % page
    return StepTensors(
        torch.where(real, tables.tokens[of, positions].long(), 0),
        positions,
        torch.where(real, slots, spare_slot),
        tables.computed[step.sequence.long()] + taken.int(),
    )


def prepare_triton(tables: SequenceTables, step: Step, count: int, page: int, spare_slot: int) -> StepTensors:
    """Return `prepare` by the kernel."""
    sequences, device = step.sequence.shape[0], step.sequence.device
    tokens, positions, slots = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(3))
    context = torch.empty(sequences, dtype=torch.int32, device=device)
    launch = launch_for("prepare", count, device_of(step.sequence))
    _prepare_kernel[(-(-max(count, sequences) // launch.block_m),)](
        tables.tokens,
        tables.computed,
        tables.block_table,
        step.sequence,
        step.starts,
        tokens,
        positions,
        slots,
        context,
        count,
        sequences,
        tables.block_table.shape[1],
        tables.tokens.shape[1],
        spare_slot,
        PAGE=page,
        HALVINGS=power_of_two(sequences).bit_length() - 1,
        BLOCK=launch.block_m,
        **launch.options,
    )
    return StepTensors(tokens, positions, slots, context)


@jit
def _prepare_kernel(
    known: Pointer,  # [S, most_tokens]
    computed: Pointer,  # [S]
    block_table: Pointer,  # [S, table_width]
    sequence: Pointer,  # [sequences]
    starts: Pointer,  # [sequences + 1]
    token_out: Pointer,  # [tokens] int64
    position_out: Pointer,  # [tokens] int64
    slot_out: Pointer,  # [tokens] int64
    context: Pointer,  # [sequences] int32
    tokens: int,
    sequences: int,
    table_width: int,
    most_tokens: int,
    spare_slot: int,
    PAGE: tl.constexpr,
    HALVINGS: tl.constexpr,  # 2 ** HALVINGS ≥ sequences
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = index < tl.load(starts + sequences)
    place = tl.zeros((BLOCK,), tl.int32)  # the last sequence that starts at or before the token
    for halving in range(HALVINGS):
        further = place + (1 << (HALVINGS - 1 - halving))
        start = tl.load(starts + further, mask=further < sequences, other=0)
        place = tl.where((further < sequences) & (start <= index), further, place)
    of = tl.load(sequence + place, mask=real, other=0).to(tl.int64)
    position = tl.load(computed + of, mask=real, other=0) + index - tl.load(starts + place, mask=real, other=0)
    position = tl.where(real, position, 0)
    token = tl.load(known + of * most_tokens + position, mask=real, other=0)
    block = tl.load(block_table + of * table_width + position // PAGE, mask=real, other=0).to(tl.int64)
    slot = tl.where(real, block * PAGE + position % PAGE, spare_slot)
    tl.store(token_out + index, token.to(tl.int64), mask=index < tokens)
    tl.store(position_out + index, position.to(tl.int64), mask=index < tokens)
    tl.store(slot_out + index, slot, mask=index < tokens)

    own = index < sequences  # the same lanes once more, one for each sequence
    held = tl.load(computed + tl.load(sequence + index, mask=own, other=0).to(tl.int64), mask=own, other=0)
    taken = tl.load(starts + index + 1, mask=own, other=0) - tl.load(starts + index, mask=own, other=0)
    tl.store(context + index, held + taken, mask=own)


def advance(
    tables: SequenceTables,
    step: Step,
    drawing: Tensor,  # [R] int32  rows of the tables for which a token was drawn, none twice
    drawn: Tensor,  # [R] int64
) -> None:
    """Note in the tables that a step is done: its tokens are computed, and what was drawn is appended.

    A sequence whose row is full keeps its length: the token is not stored, and nothing is written elsewhere.

    Raises:
        ShapeError: an argument disagrees with the shapes above.
    """
    _check(tables, step)
    check_shape("drawn", drawn, *drawing.shape)
    check_layout("drawing", drawing, torch.int32)
    check_layout("drawn", drawn, torch.int64)
    if step.sequence.is_cuda:
        advance_triton(tables, step, drawing, drawn)
        return
    tables.computed.index_add_(0, step.sequence, step.starts[1:] - step.starts[:-1])
    fits = tables.length[drawing.long()] < tables.tokens.shape[1]
    rows, added = drawing[fits].long(), drawn[fits]
    tables.tokens[rows, tables.length[rows].long()] = added.int()
    tables.length[rows] += 1
    if tables.history is not None:
        tables.history[rows, added] += 2


def advance_triton(tables: SequenceTables, step: Step, drawing: Tensor, drawn: Tensor) -> None:
    """Do `advance` by the kernel."""
    sequences, rows = step.sequence.shape[0], drawing.shape[0]
    launch = launch_for("prepare", max(sequences, rows), device_of(step.sequence))
    _advance_kernel[(-(-max(sequences, rows) // launch.block_m),)](
        tables.tokens,
        tables.length,
        tables.computed,
        tables.history,
        step.sequence,
        step.starts,
        drawing,
        drawn,
        sequences,
        rows,
        tables.tokens.shape[1],
        VOCABULARY=1 if tables.history is None else tables.history.shape[1],
        BLOCK=launch.block_m,
        **launch.options,
    )


@jit
def _advance_kernel(
    known: Pointer,  # [S, most_tokens]
    length: Pointer,  # [S]
    computed: Pointer,  # [S]
    history: Pointer,  # [S, VOCABULARY], or None
    sequence: Pointer,  # [sequences]
    starts: Pointer,  # [sequences + 1]
    drawing: Pointer,  # [rows]
    drawn: Pointer,  # [rows] int64
    sequences: int,
    rows: int,
    most_tokens: int,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    taken = tl.load(starts + index + 1, mask=index < sequences, other=0)
    taken -= tl.load(starts + index, mask=index < sequences, other=0)
    own = (index < sequences) & (taken > 0)  # what fills up a step may name a sequence that another place advances
    of = tl.load(sequence + index, mask=own, other=0).to(tl.int64)
    tl.store(computed + of, tl.load(computed + of, mask=own, other=0) + taken, mask=own)

    of = tl.load(drawing + index, mask=index < rows, other=0).to(tl.int64)
    token = tl.load(drawn + index, mask=index < rows, other=0)
    end = tl.load(length + of, mask=index < rows, other=0)
    fits = (index < rows) & (end < most_tokens)
    tl.store(known + of * most_tokens + end, token.to(tl.int32), mask=fits)
    tl.store(length + of, end + 1, mask=fits)
    if history is not None:
        count = history + of * VOCABULARY + token
        tl.store(count, tl.load(count, mask=fits, other=0) + 2, mask=fits)


def prepare_reference(tables: SequenceTables, step: Step, count: int, page: int, spare_slot: int) -> StepTensors:
    """Return the same, token by token."""
    starts, found, context = step.starts.tolist(), [], []
    for place, row in enumerate(step.sequence.tolist()):
        first, taken = int(tables.computed[row]), starts[place + 1] - starts[place]
        context.append(first + taken)
        for position in range(first, first + taken):
            slot = int(tables.block_table[row, position // page]) * page + position % page
            found.append((int(tables.tokens[row, position]), position, slot))
    found += [(0, 0, spare_slot)] * (count - len(found))
    columns = torch.tensor(found, dtype=torch.int64, device=step.starts.device).view(count, 3)
    lengths = torch.tensor(context, dtype=torch.int32, device=step.starts.device)
    return StepTensors(columns[:, 0], columns[:, 1], columns[:, 2], lengths)


def _check(tables: SequenceTables, step: Step) -> None:
    if tables.tokens.ndim != 2 or tables.block_table.ndim != 2:
        raise ShapeError(f"`tokens` {list(tables.tokens.shape)} and `block_table` are not [S, L] and [S, W]")
    count = tables.tokens.shape[0]
    check_shape("length", tables.length, count)
    check_shape("computed", tables.computed, count)
    check_shape("block_table", tables.block_table, count, tables.block_table.shape[1])
    if tables.history is not None:
        check_shape("history", tables.history, count, tables.history.shape[-1])
    if step.sequence.ndim != 1 or step.sequence.shape[0] < 1:
        raise ShapeError(f"`sequence` has shape {list(step.sequence.shape)}, not [Q] with 1 ≤ Q")
    check_shape("starts", step.starts, step.sequence.shape[0] + 1)
    for one in (tables, step):
        for field in fields(one):
            tensor = getattr(one, field.name)
            if tensor is not None:
                check_layout(field.name, tensor, torch.int32)
