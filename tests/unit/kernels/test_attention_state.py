"""Decode and prefill where there is no GPU: the slow version answers, and what disagrees is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.attention_state import FULL, SEGMENT, TILE, AttentionVariant
from kernels.decode_attention import decode_attention
from kernels.paged_attention import paged_attention_reference
from kernels.prefill_attention import prefill_attention
from kernels.shape import ShapeError

PAGE = 4


@dataclass(frozen=True, slots=True)
class Arguments:
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    context_len: Tensor

    def decode(self, variant: AttentionVariant = FULL) -> Tensor:
        return decode_attention(
            self.query, self.key_cache, self.value_cache, self.block_table, self.context_len, 0.25, variant
        )


def draw(sequences: int = 3, heads: int = 4, groups: int = 2, size: int = 10) -> Arguments:
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(20, PAGE, groups, size, generator=generator).bfloat16() for _ in "kv")
    table = torch.randperm(18, generator=generator).view(3, 6).int()[:sequences]
    query = torch.randn(sequences, heads, size, generator=generator).bfloat16()
    return Arguments(query, keys, values, table, torch.tensor([1, 24, 13][:sequences], dtype=torch.int32))


def test_on_a_cpu_both_answer_as_the_reference_of_the_engine_does() -> None:
    given = draw()
    out = given.decode()
    expected = paged_attention_reference(
        given.query,
        given.key_cache,
        given.value_cache,
        given.block_table.long(),
        torch.arange(3),
        given.context_len.long() - 1,
        0.25,
    )
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-2)
    cache = (given.key_cache, given.value_cache, given.block_table)
    starts = torch.tensor([0, 1, 2, 3])
    assert torch.equal(prefill_attention(given.query, *cache, starts, given.context_len, 0.25), out)


def test_a_window_that_reaches_everything_and_a_sink_of_nothing_change_nothing() -> None:
    given = draw()
    sinks = torch.full((4,), -torch.inf)
    assert torch.equal(given.decode(AttentionVariant(window=24, sinks=sinks)), given.decode())
    torch.testing.assert_close(given.decode(AttentionVariant(soft_cap=1e6)), given.decode())


def test_a_window_of_one_is_the_value_of_the_token_itself() -> None:
    given = draw()
    out = given.decode(AttentionVariant(window=1))
    for row, last in enumerate((given.context_len - 1).tolist()):
        own = given.value_cache[int(given.block_table[row, last // PAGE]), last % PAGE]
        assert torch.equal(out[row], own.repeat_interleave(2, dim=0))


def test_a_row_of_padding_is_zeros() -> None:
    given = replace(draw(), context_len=torch.tensor([3, 0, 13], dtype=torch.int32))
    for variant in (FULL, AttentionVariant(window=2, sinks=torch.zeros(4))):
        assert (given.decode(variant)[1] == 0).all()


def test_segments_are_whole_tiles() -> None:
    assert SEGMENT % TILE == 0


def test_disagreeing_arguments_are_refused() -> None:
    given = draw()
    cache = (given.key_cache, given.value_cache, given.block_table)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("key_cache", lambda: replace(given, query=given.query[..., :8]).decode()),
        ("value_cache", lambda: replace(given, value_cache=given.value_cache[1:]).decode()),
        ("block_table", lambda: replace(given, block_table=given.block_table[1:]).decode()),
        ("context_len", lambda: replace(given, query=given.query[1:]).decode()),
        ("heads", lambda: draw(heads=3).decode()),
        ("heads", lambda: draw(heads=17, groups=1).decode()),
        ("heads", lambda: draw(heads=1, groups=2).decode()),
        ("contiguous", lambda: replace(given, query=given.query.mT.contiguous().mT).decode()),
        ("holds", lambda: replace(given, value_cache=given.value_cache.half()).decode()),
        ("variant.window", lambda: given.decode(AttentionVariant(window=0))),
        ("variant.soft_cap", lambda: given.decode(AttentionVariant(soft_cap=0.0))),
        ("variant.sinks", lambda: given.decode(AttentionVariant(sinks=torch.zeros(3)))),
        ("starts", lambda: prefill_attention(given.query, *cache, torch.arange(3), given.context_len, 1.0)),
    ]
    for name, call in refused:
        with pytest.raises(ShapeError, match=name):
            call()


def test_a_cache_beyond_what_a_kernel_can_count_is_refused() -> None:
    given = draw(heads=2, groups=2, size=16)
    huge = torch.empty(1, dtype=torch.bfloat16).expand(1 << 22, 16, 2, 16)  # no memory of its own
    with pytest.raises(ShapeError, match="counts to"):
        replace(given, key_cache=huge, value_cache=huge).decode()
