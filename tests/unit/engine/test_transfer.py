"""What goes to a device together arrives apart, and what comes back together too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.transfer import ALIGNMENT, Outbox, aligned, fetch

CPU = torch.device("cpu")


def test_arrays_of_every_kind_and_size_arrive_as_they_were_and_begin_where_a_kernel_wants_them() -> None:
    generator = np.random.default_rng(0)
    arrays = [
        generator.integers(-9, 9, shape).astype(dtype)
        for dtype in (np.int32, np.int64, np.float64)
        for shape in ((1,), (3, 5), (0,), (2, 0), (7,))
    ]
    arrays.append(generator.integers(0, 9, (6, 6)).astype(np.int32)[::2, 1::3])  # not contiguous
    outbox = Outbox()
    numbers = [outbox.add(array) for array in arrays]
    sent = outbox.send(CPU)
    for number, array in zip(numbers, arrays, strict=True):
        assert np.array_equal(sent[number].numpy(), array)
        assert sent[number].numpy().dtype == array.dtype
        assert sent[number].data_ptr() % ALIGNMENT == 0 or array.size == 0


def test_an_array_that_no_kernel_takes_is_our_mistake() -> None:
    outbox = Outbox()
    outbox.add(np.zeros(3, dtype=np.float32))
    with pytest.raises(KeyError):
        outbox.send(CPU)


def test_nothing_is_sent_where_there_is_nothing() -> None:
    assert Outbox().send(CPU) == []
    assert fetch([]) == []


def test_tensors_of_every_kind_come_back_as_they_were() -> None:
    tensors = [
        torch.arange(5),
        torch.randn(3, 7),
        torch.randn(4, 3).bfloat16()[1:3],
        torch.zeros(2, 0, dtype=torch.int32),
        torch.arange(12, dtype=torch.int32).view(3, 4).T,
    ]
    for sent, got in zip(tensors, fetch(tensors), strict=True):
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent)


def test_what_begins_elsewhere_is_moved_and_nothing_else() -> None:
    row = torch.zeros(3, 4)
    assert aligned(row[1:]).data_ptr() == row[1:].data_ptr()
    odd = torch.arange(12.0).view(4, 3)
    assert aligned(odd[1:]).data_ptr() % ALIGNMENT == 0
    assert torch.equal(aligned(odd[1:]), odd[1:])
