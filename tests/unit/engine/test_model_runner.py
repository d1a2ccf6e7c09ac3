"""The runner on hand-made plans: rows in, samples out in their order, and nothing read that was not planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import KV_CACHE_DTYPES
from engine.model_runner import (
    LINEARS,
    PACKED,
    InvarianceUnavailable,
    ModelRunner,
    Product,
    blocks_in,
    choose_linears,
    choose_segment,
    products_here,
)
from engine.plan import BLOCK_SIZE, Draw, RowPlan, StepPlan
from engine.request import SamplingParams
from kernels.linear import linear_fixed_tiles
from kernels.paged_attention import SEGMENTS
from tests.support.device_engine import TINY, config_of
from tests.support.model_engine import LoadedModel, load_model

GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=True, top_logprobs=5)


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> LoadedModel:
    return load_model(tiny_models["qwen3"])


def row(tokens: list[int], start: int = 0, blocks: tuple[int, ...] = (3, 1, 4), sampled: bool = True) -> RowPlan:
    return RowPlan(tuple(tokens), start, blocks, GREEDY, (Draw(len(tokens) - 1),) if sampled else ())


def test_samples_stand_where_their_rows_do(model: LoadedModel) -> None:
    runner = ModelRunner(model.decoder, 16)
    rows = (row([5, 6], blocks=(0,)), row([7], blocks=(1,), sampled=False), row([8, 9, 10], blocks=(2,)))
    sampled = runner.run(StepPlan(rows)).sampled
    assert sampled[1] == ()
    for index in (0, 2):
        assert sampled[index] == runner.run(StepPlan((rows[index],))).sampled[0]


def test_a_step_that_samples_nothing_only_stores(model: LoadedModel) -> None:
    runner = ModelRunner(model.decoder, 16)
    tokens = [3 + index % 300 for index in range(40)]
    whole = runner.run(StepPlan((row(tokens),))).sampled[0]
    other = ModelRunner(model.decoder, 16)
    assert other.run(StepPlan((row(tokens[:33], sampled=False),))).sampled == ((),)
    assert other.run(StepPlan((row(tokens[33:], start=33),))).sampled[0] == whole


def test_after_many_tokens_of_a_row_the_same_is_sampled_as_after_each_alone(model: LoadedModel) -> None:
    tokens = [3 + 7 * index % 300 for index in range(37)]
    draws = tuple(Draw(offset) for offset in range(4, 37))
    (many,) = (
        ModelRunner(model.decoder, 16).run(StepPlan((RowPlan(tuple(tokens), 0, (3, 1, 4), GREEDY, draws),))).sampled
    )
    for draw, found in zip(draws, many, strict=True):
        alone = ModelRunner(model.decoder, 16).run(StepPlan((row(tokens[: draw.offset + 1]),))).sampled[0]
        assert alone == (found,)


def test_every_token_but_the_last_in_steps_of_one_gives_the_same_bits(model: LoadedModel) -> None:
    tokens = [3 + index * index % 300 for index in range(20)]
    whole = ModelRunner(model.decoder, 16).run(StepPlan((row(tokens),))).sampled[0]
    runner = ModelRunner(model.decoder, 16)
    for position, token in enumerate(tokens[:-1]):
        runner.run(StepPlan((row([token], start=position, sampled=False),)))
    assert runner.run(StepPlan((row(tokens[-1:], start=19),))).sampled[0] == whole


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_what_others_left_in_the_cache_is_never_read(model: LoadedModel, poison: float) -> None:
    clean, dirty = ModelRunner(model.decoder, 16), ModelRunner(model.decoder, 16)
    for cache in dirty.caches:
        for tensor in (cache.key, cache.value):
            tensor[:-1] = poison
    # The table is longer than the context, and the last block is filled in part.
    plan = StepPlan((row([5, 6, 7], blocks=(9, 2, 8)), row(list(range(10, 30)), blocks=(0, 1))))
    assert dirty.run(plan) == clean.run(plan)


def test_as_many_blocks_are_made_as_fit_the_memory(model: LoadedModel) -> None:
    config = model.config
    per_block = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * BLOCK_SIZE
    assert blocks_in(1, config) == 2**20 // per_block
    assert blocks_in(1, config, "fp8_e4m3") == 2 * (2**20 // per_block)
    runner = ModelRunner(model.decoder, 5)
    assert runner.block_count == 5
    assert {cache.key.shape[0] for cache in runner.caches} == {6}


def test_as_many_bytes_are_taken_as_were_counted(model: LoadedModel) -> None:
    for dtype in KV_CACHE_DTYPES:
        blocks = blocks_in(1, model.config, dtype)
        runner = ModelRunner(model.decoder, blocks, kv_cache_dtype=dtype)
        taken = sum(cache.key.nbytes + cache.value.nbytes for cache in runner.caches)
        assert taken * blocks // (blocks + 1) <= 1 << 20  # one block more holds zeros for ever
        assert taken > 1 << 20


def test_each_shape_of_the_model_has_a_product(model: LoadedModel) -> None:
    chosen = choose_linears(model.config, 64)
    assert set(chosen) == set(model.config.linear_shapes())
    assert set(chosen.values()) <= set(products_here())
    assert choose_segment(model.config) in SEGMENTS
    plain = choose_linears(model.config, 64, products_here(compiled=False))
    assert set(plain.values()) <= set(PACKED | LINEARS)


def test_a_product_that_leans_where_a_bias_is_added_is_not_taken_for_one() -> None:
    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_fixed_tiles(x, weight, bias) + (0 if bias is None else x.shape[0])

    products = {"fast": Product(multiply), "sure": Product(linear_fixed_tiles)}
    config = config_of("qwen2", TINY)
    chosen = choose_linears(config, 64, products)
    assert {shape for shape, name in chosen.items() if name == "sure"} == {(sum(config.qkv_sizes), TINY.hidden)}
    assert set(choose_linears(config_of("llama", TINY), 64, products).values()) == {"fast"}


def test_a_machine_without_an_invariant_product_does_not_start(model: LoadedModel) -> None:
    def leaning(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x @ weight.T + x.shape[0]

    with pytest.raises(InvarianceUnavailable, match="could not be replayed"):
        choose_linears(model.config, 64, {"leaning": Product(leaning)})
