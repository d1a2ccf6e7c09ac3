"""A file of weights: read as safetensors reads it, from front to back, or refused before memory is made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.reading import PIECE, Reading
from engine.shard import MAX_HEADER, Shard, ShardError

FILE = "model.safetensors"
NAME = "model.norm.weight"
KINDS = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
)


def read(directory: Path) -> dict[str, torch.Tensor]:
    with Reading(directory).stream(FILE) as stream:
        return {one.name: tensor for one, tensor in Shard(stream).read()}


def write(directory: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (directory / FILE).write_bytes(size.to_bytes(8, "little") + text + data)
    return directory


def said(**changes: Any) -> dict[str, Any]:
    return {NAME: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12], **changes}}


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.dictionaries(st.text(max_size=12), st.tuples(shapes, st.sampled_from(KINDS)), max_size=6))
def test_what_safetensors_writes_is_read_bit_for_bit(
    tmp_path: Path, drawn: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn.pop("__metadata__", None)
    written = {}
    for name, (shape, kind) in drawn.items():
        raw = torch.randint(0, 256, (*shape, kind.itemsize), generator=generator).to(torch.uint8)
        written[name] = raw.view(kind).reshape(shape) if raw.numel() else torch.empty(shape, dtype=kind)
    save_file(written, tmp_path / FILE, {"format": "pt"})
    found = read(tmp_path)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_weight_of_many_pieces_is_whole(tmp_path: Path) -> None:
    drawn = torch.randint(0, 256, (PIECE * 3 + 17,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_file({"a": drawn, "b": torch.ones(3)}, tmp_path / FILE)
    assert all(torch.equal(tensor, load_file(tmp_path / FILE)[name]) for name, tensor in read(tmp_path).items())


def test_a_weight_has_memory_of_its_own(tmp_path: Path) -> None:
    """So that it goes when it goes, and what becomes of the file is nothing to it."""
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / FILE)
    found = read(tmp_path)
    assert found["a"].untyped_storage().nbytes() == 4000
    with (tmp_path / FILE).open("r+b") as file:
        file.write(bytes(9000))
    assert bool((found["a"] == 1).all())


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"[]", b""),
        (b"\xff" * 20, b""),
        (b"[" * 100_000, b""),
        ({NAME: None}, bytes(12)),
        ({NAME: {"dtype": "BF16", "shape": [2, 3]}}, bytes(12)),
        (said(dtype="BF17"), bytes(12)),
        (said(dtype=["BF16"]), bytes(12)),
        (said(shape="23"), bytes(12)),
        (said(shape=[2, 3.0]), bytes(12)),
        (said(shape=[2, True]), bytes(4)),
        (said(shape=[-2, -3]), bytes(12)),
        (said(shape=[1] * 99), bytes(2)),
        (said(shape=[2**40, 2**40]), bytes(12)),
        (said(shape=[0, 2**61]), bytes(12)),
        (said(shape=[2, 4]), bytes(16)),
        (said(data_offsets=[0, 11]), bytes(12)),
        (said(data_offsets=[1, 13]), bytes(13)),
        (said(data_offsets=[-12, 0]), bytes(12)),
        (said(data_offsets=[0, 12, 24]), bytes(24)),
        (said(data_offsets=[0.0, 12.0]), bytes(12)),
        (said(), bytes(11)),
        (said(), bytes(13)),
        (said(shape=[2**50], data_offsets=[0, 2**51]), bytes(12)),
        ({**said(), "twice": said()[NAME]}, bytes(12)),
        ({**said(), "late": said(data_offsets=[13, 25])[NAME]}, bytes(25)),
    ],
)
def test_a_header_that_does_not_account_for_every_byte_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    with pytest.raises(ShardError, match=f"`{FILE}` cannot be read as safetensors"):
        read(write(tmp_path, header, data))


@pytest.mark.parametrize("length", [0, 1, 10**6, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_that_is_as_long_as_no_header_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ShardError, match=f"`{FILE}` cannot be read as safetensors"):
        read(write(tmp_path, said(), bytes(12), length))


def test_what_a_writer_says_of_itself_is_let_pass(tmp_path: Path) -> None:
    written = write(tmp_path, {"__metadata__": {"format": "pt", "by": "somebody"}, **said()}, bytes(12))
    assert torch.equal(read(written)[NAME], torch.zeros(2, 3, dtype=torch.bfloat16))
