"""From a PEFT directory to an adapter and a version: read as PEFT reads it, or refused by name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapters import AdapterError, adapter_version, load_adapter, load_adapters, read_adapter, read_config
from engine.config import EngineStartError
from engine.models.arithmetic import Adapter
from engine.models.decoder import DecoderConfig
from engine.reading import Reading
from engine.weights import digest_directory, version_digest
from kernels.low_rank import LowRank
from tests.support.adapters import ATTENTION, EVERY, write_adapter

RANK = 4
HEADS, GROUPS = 128, 64  # outputs of q, and of k and v, of the tiny `qwen3`


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["qwen3"]


@pytest.fixture(scope="module")
def config(model: Path) -> DecoderConfig:
    return DecoderConfig.from_json(Reading(model).json("config.json"))


def load(directory: Path, config: DecoderConfig) -> Adapter:
    return load_adapter(read_adapter(directory), config)


def low_rank(directory: Path, config: DecoderConfig, layer: int, product: str) -> LowRank:
    return load(directory, config).layers[layer][product]


def factor(directory: Path, layer: int, module: str, which: str) -> torch.Tensor:
    name = f"base_model.model.model.layers.{layer}.{module}.lora_{which}.weight"
    return load_file(directory / "adapter_model.safetensors")[name]


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(("rooted", "scale"), [(False, 2.0), (True, 2 * RANK**0.5)])
def test_factors_of_fused_modules_stand_apart_and_carry_the_scale(
    tmp_path: Path, model: Path, config: DecoderConfig, rooted: bool, scale: float
) -> None:
    directory = write_adapter(tmp_path / "a", model, rank=RANK, use_rslora=rooted)
    found = low_rank(directory, config, 1, "qkv")
    assert found.down.shape == (3 * RANK, 64)
    row = 0
    for index, (part, outputs) in enumerate((("q", HEADS), ("k", GROUPS), ("v", GROUPS))):
        module, columns = f"self_attn.{part}_proj", slice(index * RANK, (index + 1) * RANK)
        assert torch.equal(found.down[columns], factor(directory, 1, module, "A").bfloat16())
        block = found.up[row : row + outputs]
        assert torch.equal(block[:, columns], (scale * factor(directory, 1, module, "B")).bfloat16())
        assert int(block.count_nonzero()) == outputs * RANK
        row += outputs
    assert row == len(found.up)


def test_only_targets_are_changed(tmp_path: Path, model: Path, config: DecoderConfig) -> None:
    adapter = load_adapter(
        read_adapter(write_adapter(tmp_path / "a", model, rank=RANK, targets=("v_proj", "down_proj"))), config
    )
    assert [set(layer) for layer in adapter.layers] == [{"qkv", "down"}] * 2
    found = adapter.layers[0]["qkv"]
    assert found.down.shape == (RANK, 64)
    assert not found.up[: HEADS + GROUPS].any()
    assert found.up[HEADS + GROUPS :].all()


@pytest.mark.parametrize(
    ("stated", "targets"),
    [
        ("all-linear", EVERY),
        (r".*self_attn\.[qkvo]_proj", ATTENTION),
        (r"model\.layers\.\d+\.mlp\.(gate|up)_proj", ("gate_proj", "up_proj")),
        (["mlp.down_proj"], ("down_proj",)),
    ],
)
def test_targets_are_read_as_peft_reads_them(
    tmp_path: Path, model: Path, config: DecoderConfig, stated: Any, targets: tuple[str, ...]
) -> None:
    directory = write_adapter(tmp_path / "a", model, targets=targets, target_modules=stated)
    written = write_adapter(tmp_path / "b", model, targets=targets)
    for ours, theirs in zip(
        load(directory, config).layers,
        load(written, config).layers,
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].up, theirs[name].up) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrower_types_are_read(tmp_path: Path, model: Path, config: DecoderConfig, dtype: torch.dtype) -> None:
    directory = write_adapter(tmp_path / "a", model, dtype=dtype)
    assert torch.equal(
        low_rank(directory, config, 0, "o").down, factor(directory, 0, "self_attn.o_proj", "A").bfloat16()
    )


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("exclude_modules", ["q_proj"]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("use_qalora", True),
        ("trainable_token_indices", [5]),
        ("target_parameters", ["experts"]),
        ("alora_invocation_tokens", [1, 2]),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "LOHA"),
        ("peft_type", ...),
        ("use_something_new", True),
        ("r", 0),
        ("r", 513),
        ("r", True),
        ("r", ...),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("use_rslora", "yes"),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", "("),
        ("target_modules", ["q_proj", "c_attn"]),
        ("target_modules", ["q_proj", "embed_tokens"]),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ".*(q_proj|lm_head)"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    tmp_path: Path, model: Path, config: DecoderConfig, member: str, value: object
) -> None:
    directory = write_adapter(tmp_path / "a", model, **{member: value})
    with pytest.raises(AdapterError, match=f"`{member}`"):
        load(directory, config)


def test_members_that_say_only_how_it_was_trained_are_let_pass(tmp_path: Path, model: Path) -> None:
    changes = {"lora_dropout": 0.3, "init_lora_weights": "gaussian", "inference_mode": False, "revision": "main"}
    assert read_config(Reading(write_adapter(tmp_path / "a", model, rank=RANK, **changes))).scale == 2.0


def test_what_is_wrong_with_a_weight_is_named(tmp_path: Path, model: Path, config: DecoderConfig) -> None:
    directory = write_adapter(tmp_path / "a", model)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    unknown = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.zeros(3),
        "base_model.model.model.embed_tokens.weight": torch.zeros(3),
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3),
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.zeros(3),
    }
    cases: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({name: None}, f"`{name}` is missing \\(1 in all\\)"),
        ({name: torch.zeros(5, 64)}, f"`{name}` has shape \\[5, 64\\], not \\[4, 64\\]"),
        ({name: torch.zeros(4, 64, dtype=torch.int8)}, f"`{name}` is torch.int8"),
        *(({extra: tensor}, re.escape(f"`{extra}` is not one")) for extra, tensor in unknown.items()),
    ]
    whole = (directory / "adapter_model.safetensors").read_bytes()
    for changes, said in cases:
        rewrite(directory, **changes)
        with pytest.raises(AdapterError, match=said):
            load(directory, config)
        (directory / "adapter_model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff" * 1000])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, model: Path, config: DecoderConfig, file: str, damage: bytes) -> None:
    directory = write_adapter(tmp_path / "a", model)
    (directory / file).write_bytes(damage)
    with pytest.raises(EngineStartError, match=f"`{file}`"):
        load(directory, config)


def test_the_version_covers_the_model_and_both_files_and_no_name(tmp_path: Path, model: Path) -> None:
    base = digest_directory(model)
    directory = write_adapter(tmp_path / "a", model)
    version = adapter_version(base, "a", directory)
    assert version.adapter is not None
    assert version.digest == version_digest(version) != base.digest
    assert (version.weights, version.tokenizer) == (base.weights, base.tokenizer)
    assert adapter_version(base, "b", Path(shutil.copytree(directory, tmp_path / "b"))).digest == version.digest
    others = [
        adapter_version(base, "a", write_adapter(tmp_path / "c", model, seed=1)),
        adapter_version(base, "a", write_adapter(tmp_path / "d", model, lora_alpha=9)),
        adapter_version(digest_directory(model.parent / "llama"), "a", directory),
    ]
    assert len({other.digest for other in (base, version, *others)}) == 5


def test_of_many_the_one_that_is_refused_is_named(tmp_path: Path, model: Path, config: DecoderConfig) -> None:
    base = digest_directory(model)
    good, bad = write_adapter(tmp_path / "good", model), write_adapter(tmp_path / "bad", model, use_dora=True)
    assert list(load_adapters([("good", good)], config, base)) == ["good"]
    for source in (bad, tmp_path / "absent"):
        with pytest.raises(AdapterError, match="adapter `second`: "):
            load_adapters([("first", good), ("second", source)], config, base)
    with pytest.raises(AdapterError, match="`first` and `second` are the same"):
        load_adapters([("first", good), ("second", good)], config, base)
    (good / "adapter_model.safetensors").rename(good / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"`adapter_model\.safetensors` is missing"):
        load_adapters([("first", good)], config, base)


def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, tiny_models: dict[str, Path], config: DecoderConfig
) -> None:
    directory = write_adapter(tmp_path / "a", tiny_models["wide"])
    with pytest.raises(AdapterError, match="has shape"):
        load(directory, config)
