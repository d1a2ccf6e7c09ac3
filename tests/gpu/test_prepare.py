"""A step's inputs and what it leaves behind: exact, for steps of every make-up, and nothing written elsewhere."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from kernels.prepare import (
    SequenceTables,
    Step,
    StepTensors,
    advance,
    advance_triton,
    prepare,
    prepare_reference,
    prepare_triton,
)
from kernels.shape import ShapeError
from tests.support.batches import MOST_ROWS, assert_rows_are_their_own

PAGE, SPARE, VOCABULARY = 16, 7777, 60
MAKE_UPS = {
    "one token": [1],
    "a prompt": [300],
    "decode": [1] * 40,
    "mixed": [1, 1, 130, 1, 17, 1, 64],
    "some have none": [0, 0, 5, 0, 1, 0],
    "nothing": [0, 0],
    "many": [1] * 129,
}


def tables_of(counts: list[int], generator: torch.Generator, device: torch.device) -> tuple[SequenceTables, Step]:
    """Return sequences of which some is computed, and a step that computes so many more of each."""
    rows, most = len(counts) + 3, 420
    computed = torch.randint(100, (rows,), generator=generator, dtype=torch.int32)
    sequence = torch.randperm(rows, generator=generator)[: len(counts)].int()
    length = computed.clone()
    length[sequence.long()] += torch.tensor(counts, dtype=torch.int32)
    tables = SequenceTables(
        tokens=torch.randint(VOCABULARY, (rows, most), generator=generator, dtype=torch.int32).to(device),
        length=length.to(device),
        computed=computed.to(device),
        block_table=torch.randperm(rows * 27, generator=generator).view(rows, 27).int().to(device),
        history=torch.randint(5, (rows, VOCABULARY), generator=generator, dtype=torch.int32).to(device),
    )
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return tables, Step(sequence.to(device), starts.to(device))


def copied(tables: SequenceTables) -> SequenceTables:
    return replace(tables, **{field.name: getattr(tables, field.name).clone() for field in fields(tables)})


def assert_equal(found: SequenceTables | StepTensors, expected: SequenceTables | StepTensors) -> None:
    for field in fields(found):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


@pytest.mark.parametrize("name", MAKE_UPS)
@pytest.mark.parametrize("filling", [0, 1, 200])
def test_inputs_are_those_of_the_slow_version(
    name: str, filling: int, device: torch.device, generator: torch.Generator
) -> None:
    tables, step = tables_of(MAKE_UPS[name], generator, device)
    count = sum(MAKE_UPS[name]) + filling
    expected = prepare_reference(tables, step, count, PAGE, SPARE)
    assert_equal(prepare_triton(tables, step, count, PAGE, SPARE), expected)
    tables, step = (type(one)(*(getattr(one, f.name).cpu() for f in fields(one))) for one in (tables, step))
    on_cpu = StepTensors(*(getattr(expected, field.name).cpu() for field in fields(expected)))
    assert_equal(prepare(tables, step, count, PAGE, SPARE), on_cpu)


@pytest.mark.parametrize("name", MAKE_UPS)
def test_a_step_advances_its_own_sequences_and_no_other(
    name: str, device: torch.device, generator: torch.Generator
) -> None:
    tables, step = tables_of(MAKE_UPS[name], generator, device)
    drawing = step.sequence[::2].contiguous()
    drawn = torch.randint(VOCABULARY, drawing.shape, generator=generator).to(device)
    expected = copied(tables)
    assert expected.history is not None
    for place, row in enumerate(step.sequence.tolist()):
        expected.computed[row] += MAKE_UPS[name][place]
    for row, token in zip(drawing.tolist(), drawn.tolist(), strict=True):
        expected.tokens[row, int(expected.length[row])] = token
        expected.length[row] += 1
        expected.history[row, token] += 2
    by_kernel, plain = copied(tables), SequenceTables(*(getattr(tables, f.name).cpu().clone() for f in fields(tables)))
    advance_triton(by_kernel, step, drawing, drawn)
    assert_equal(by_kernel, expected)
    advance(plain, Step(step.sequence.cpu(), step.starts.cpu()), drawing.cpu(), drawn.cpu())
    assert_equal(plain, SequenceTables(*(getattr(expected, f.name).cpu() for f in fields(expected))))


def test_what_a_sequence_computes_and_leaves_behind_does_not_depend_on_its_neighbours(
    device: torch.device, generator: torch.Generator
) -> None:
    """Of every sequence one token, and one drawn."""
    tables, step = tables_of([1] * MOST_ROWS, generator, device)
    drawn = torch.randint(VOCABULARY, (MOST_ROWS,), generator=generator).to(device)

    def computed(part: slice) -> list[Tensor]:
        own, after = step.sequence[part].contiguous(), copied(tables)
        count = len(own)
        alone = Step(own, step.starts[: count + 1].contiguous())
        inputs = prepare_triton(tables, alone, count, PAGE, SPARE)
        advance_triton(after, alone, own, drawn[part].contiguous())
        left = (getattr(after, field.name)[own.long()] for field in fields(after))
        return [*(getattr(inputs, field.name) for field in fields(inputs)), *left]

    assert_rows_are_their_own(computed)


def test_what_fills_up_a_step_may_name_a_sequence_that_is_in_it(device: torch.device) -> None:
    tables = SequenceTables(
        torch.zeros(2, 9, dtype=torch.int32, device=device),
        *(torch.full((2,), 3, dtype=torch.int32, device=device) for _ in range(2)),
        torch.zeros(2, 1, dtype=torch.int32, device=device),
    )
    step = Step(*(torch.tensor(one, dtype=torch.int32, device=device) for one in ([1, 1, 1], [0, 1, 1, 1])))
    none = torch.empty(0, dtype=torch.int64, device=device)
    advance_triton(tables, step, none.int(), none)
    assert tables.computed.tolist() == [3, 4]


def test_a_full_row_takes_no_token_and_its_neighbour_is_not_written_to(device: torch.device) -> None:
    tables = SequenceTables(
        torch.arange(8, dtype=torch.int32, device=device).view(2, 4),
        torch.tensor([4, 2], dtype=torch.int32, device=device),
        torch.tensor([3, 1], dtype=torch.int32, device=device),
        torch.zeros(2, 1, dtype=torch.int32, device=device),
        torch.zeros(2, 9, dtype=torch.int32, device=device),
    )
    step = Step(*(torch.tensor(one, dtype=torch.int32, device=device) for one in ([0, 1], [0, 1, 2])))
    for do, at in ((advance_triton, copied(tables)), (advance, copied(tables) if device.type == "cpu" else None)):
        if at is not None:
            do(at, step, step.sequence, torch.tensor([8, 5], device=device))
            assert at.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 5, 7]]
            assert at.length.tolist() == [4, 3]
            assert at.computed.tolist() == [4, 2]
            assert at.history is not None
            assert at.history.sum(1).tolist() == [0, 2]


def test_disagreeing_arguments_are_refused(generator: torch.Generator) -> None:
    tables, step = tables_of([1, 2], generator, torch.device("cpu"))
    wrong = {
        "length": replace(tables, length=tables.length[:1]),
        "computed": replace(tables, computed=tables.computed[:1]),
        "block_table": replace(tables, block_table=tables.block_table[:1]),
        "tokens": replace(tables, tokens=tables.tokens[0]),
        "history": replace(tables, history=tables.tokens[:1]),
    }
    for name, refused in wrong.items():
        with pytest.raises(ShapeError, match=f"`{name}`"):
            prepare(refused, step, 3, PAGE, SPARE)
    for name, other in {
        "starts": Step(step.sequence, step.starts[1:]),
        "sequence": Step(step.starts[:0], step.starts),
    }.items():
        with pytest.raises(ShapeError, match=f"`{name}`"):
            prepare(tables, other, 3, PAGE, SPARE)
    with pytest.raises(ShapeError, match="`block_table` holds"):
        prepare(replace(tables, block_table=tables.block_table.long()), step, 3, PAGE, SPARE)
    with pytest.raises(ShapeError, match="`tokens` is not contiguous"):
        prepare(replace(tables, tokens=tables.tokens[:, ::2]), step, 3, PAGE, SPARE)
    with pytest.raises(ShapeError, match="`drawn`"):
        advance(tables, step, step.sequence, torch.zeros(1, dtype=torch.int64))
