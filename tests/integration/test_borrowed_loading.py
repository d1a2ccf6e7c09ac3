"""From the directory of a family that is not native to an engine that answers, and what is refused by name first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import probe
from engine.config import EngineConfig, EngineStartError, UnsupportedModel
from engine.load import load_engine
from engine.model_loading import configuration, load_model
from engine.model_runner import InvarianceUnavailable
from engine.models.borrowed import BorrowedModel, build
from engine.models.borrowed_config import BorrowedConfig
from engine.models.operations import Operations
from engine.models.products import Products
from engine.reading import Reading
from engine.replay import ReplayOutcome, regenerate
from engine.request import GenerationRequest, SamplingParams
from engine.weights import load_tensors
from kernels.linear import linear_fixed_tiles
from kernels.paged_attention import SEGMENTS
from tests.support.tiny_families import write_family

Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def settings(directory: Path) -> EngineConfig:
    return EngineConfig(directory, threads=1, kv_cache_mib=4, max_sequences=8, max_tokens_per_step=64)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
async def test_an_answer_is_generated_and_repeated_bit_for_bit(family: str, tiny_families: dict[str, Path]) -> None:
    engine = load_engine(settings(tiny_families[family]))
    try:
        sampling = SamplingParams(max_tokens=30, seed=11, temperature=0.8, logprobs=True, ignore_eos=True)
        prompt = tuple(3 + 7 * index % 300 for index in range(150))
        request = GenerationRequest("first", prompt, sampling, b"salt", "tenant")
        deltas = [delta async for delta in engine.generate(request)]
        stats = deltas[-1].stats
        assert stats is not None
        verdict = await regenerate(
            engine,
            replace(request, request_id="again"),
            stats.replay_digest,
            recorded_policy=engine.numeric_policy,
            recorded_tokens=[token for delta in deltas for token in delta.tokens],
        )
        assert verdict.outcome is ReplayOutcome.IDENTICAL
    finally:
        engine.close()


def test_the_numeric_policy_names_whose_code_the_layers_are(tiny_families: dict[str, Path]) -> None:
    policies = {family: load_model(Reading(tiny_families[family]), 64).policy for family in ("gemma3", "phi3")}
    for family, architecture in (("gemma3", "Gemma3ForCausalLM"), ("phi3", "Phi3ForCausalLM")):
        text = json.dumps(policies[family])
        assert architecture in text
        assert '"transformers"' in text
    assert policies["gemma3"] != policies["phi3"]


# --- weights ---


def rewritten(source: Path, target: Path, change: Callable[[Weights], None]) -> Path:
    directory = Path(shutil.copytree(source, target))
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("family", ["gemma2", "phi3", "mixtral", "gpt_oss"])
def test_a_weight_that_is_missing_or_too_many_or_misshapen_is_named(
    family: str, tiny_families: dict[str, Path], tmp_path: Path
) -> None:
    some = sorted(load_file(tiny_families[family] / "model.safetensors"))
    name = next(name for name in some if "expert" in name or "down_proj" in name)
    extra = "model.layers.0.surprise.weight"
    changes: tuple[tuple[str, Callable[[Weights], None]], ...] = (
        (name, lambda weights: weights.__delitem__(name)),
        (name, lambda weights: weights.update({name: torch.zeros(3, 5)})),
        (extra, lambda weights: weights.update({extra: torch.zeros(3)})),
    )
    for index, (wrong, change) in enumerate(changes):
        directory = rewritten(tiny_families[family], tmp_path / str(index), change)
        with pytest.raises(EngineStartError, match=f"`{wrong}`"):
            load_model(Reading(directory), 64)


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    whole, sharded = (write_family(tmp_path / size, "mixtral", max_shard_size=size) for size in ("1GB", "60KB"))
    assert len(list(sharded.glob("*.safetensors"))) > 1
    ours, theirs = (load_tensors(Reading(one)).tensors for one in (whole, sharded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_weight_stored_in_two_files_is_named(tmp_path: Path) -> None:
    directory = write_family(tmp_path / "model", "olmo2", max_shard_size="60KB")
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(EngineStartError, match=f"`{name}` is stored twice"):
        load_tensors(Reading(directory))


@pytest.mark.parametrize(
    ("kinds", "cast"),
    [((torch.bfloat16,), ()), ((torch.float32, torch.bfloat16), ("float32",)), ((torch.float16,), ("float16",))],
)
def test_what_weights_were_cast_from_is_told(
    kinds: tuple[torch.dtype, ...], cast: tuple[str, ...], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    def change(weights: Weights) -> None:
        for index, name in enumerate(sorted(weights)):
            weights[name] = weights[name].to(kinds[index % len(kinds)])

    directory = rewritten(tiny_models["llama"], tmp_path / "model", change)
    assert load_tensors(Reading(directory)).cast == cast
    engine = load_engine(settings(directory))
    engine.close()
    assert engine.model.cast == cast


# --- what is not served ---


def changed(directory: Path, **values: Any) -> dict[str, Any]:
    return {**Reading(directory).json("config.json"), **values}


@pytest.mark.parametrize(
    ("family", "values", "said"),
    [
        ("gemma2", {"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "`BloomForCausalLM` computes its"),
        ("gemma2", {"architectures": ["os"]}, "`os` is not a language model"),
        ("gemma2", {"architectures": []}, "`none` is not"),
        ("gemma2", {"model_type": "gemma"}, "`model_type`"),
        ("gemma2", {"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ("gemma2", {"sliding_window": 0}, "`sliding_window` of 0"),
        ("gemma2", {"num_attention_heads": "four"}, "`config.json` cannot be read|`num_attention_heads`"),
        ("olmo2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "`dynamic`"),
        ("gpt_oss", {"layer_types": ["linear_attention", "full_attention"]}, "`linear_attention`|cannot be read"),
    ],
)
def test_a_configuration_that_is_not_computed_exactly_is_refused_by_name(
    family: str, values: dict[str, Any], said: str, tiny_families: dict[str, Path]
) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        configuration(changed(tiny_families[family], **values))


def test_a_native_family_with_a_feature_of_nobody_is_refused_in_its_own_words(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedModel, match="hidden_act"):
        configuration(changed(tiny_models["llama"], hidden_act="relu", quantization_config={"quant_method": "fp8"}))


def test_positions_that_change_with_the_length_are_served_up_to_where_they_do(tiny_families: dict[str, Path]) -> None:
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": 256,
    }
    values = changed(tiny_families["phi3"], rope_parameters=rope, original_max_position_embeddings=256)
    with pytest.raises(UnsupportedModel, match="set `context_length` to at most 256"):
        configuration(values)
    assert isinstance(configuration(values, 256), BorrowedConfig)


def test_adapters_beside_a_family_that_is_not_native_are_refused(tiny_families: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedModel, match="`adapters`"):
        load_engine(replace(settings(tiny_families["gemma2"]), adapters=(("a", Path("nowhere")),)))


# --- what running it finds out ---


def borrowed(directory: Path) -> tuple[BorrowedConfig, Any]:
    config = configuration(Reading(directory).json("config.json"))
    assert isinstance(config, BorrowedConfig)
    return config, build(config, load_tensors(Reading(directory)).tensors)


def served(config: BorrowedConfig, module: Any) -> BorrowedModel:
    return BorrowedModel(config, module, linear_fixed_tiles, SEGMENTS["tiled"], config.max_position_embeddings)


def test_a_model_that_is_not_what_transformers_computes_is_refused(tiny_families: dict[str, Path]) -> None:
    config, module = borrowed(tiny_families["gemma3"])
    tokens = probe.probe_tokens(config.vocab_size, config.windows, config.max_position_embeddings)
    expected = probe.reference(module, tokens)
    with pytest.raises(UnsupportedModel, match="does not give with our attention"):
        probe.verify(served(config, module), tokens, expected.roll(1, 0))


def test_a_layer_that_looks_at_its_neighbours_is_refused(tiny_families: dict[str, Path]) -> None:
    config, module = borrowed(tiny_families["olmo2"])
    tokens = probe.probe_tokens(config.vocab_size, config.windows, config.max_position_embeddings)
    expected = probe.reference(module, tokens)
    norm = module.model.norm.forward
    module.model.norm.forward = lambda x: norm(x + 1e-3 * x.mean(dim=1, keepdim=True))  # over the tokens of the step
    with pytest.raises(InvarianceUnavailable, match="other bits among neighbours"):
        probe.verify(served(config, module), tokens, expected)


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        (lambda x: x @ x.T, "matmul"),
        (lambda x: torch.einsum("ij,kj->ik", x, x), "einsum"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: torch.cdist(x, x), "cdist"),
        (lambda x: torch.fft.fft(x), "fft"),
    ],
)
def test_an_operation_that_is_not_known_to_keep_rows_apart_ends_the_pass(
    operation: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    products = Products(linear_fixed_tiles)
    with products, Operations(products), pytest.raises(UnsupportedModel, match=named):
        operation(torch.ones(4, 4))
