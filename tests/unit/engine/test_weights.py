"""From a model directory to parameters and a version: what is wrong is named, what is changed is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapters import adapter_version
from engine.models.decoder import DecoderConfig, parameter_shapes
from engine.reading import Reading, WeightsError
from engine.weights import digest_directory, load_parameters
from tests.support.tiny_models import write_model


@pytest.fixture
def directory(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["qwen2"], tmp_path / "model"))


def load(directory: Path) -> dict[str, torch.Tensor]:
    reading = Reading(directory)
    shapes = parameter_shapes(DecoderConfig.from_json(reading.json("config.json")))
    return load_parameters(reading, shapes).tensors


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Give named weights other values, or take them away."""
    path = directory / "model.safetensors"
    weights = {**load_file(path), **changes}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path)


def test_the_parameters_are_those_written(directory: Path) -> None:
    written = load_file(directory / "model.safetensors")
    loaded = load(directory)
    assert all(torch.equal(loaded[name], weight) for name, weight in written.items())


def test_shards_load_as_one_file_does_and_have_a_version_of_their_own(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole", "llama")
    sharded = write_model(tmp_path / "sharded", "llama", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    ours, theirs = load(whole), load(sharded)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert digest_directory(whole).weights != digest_directory(sharded).weights
    assert digest_directory(whole).tokenizer == digest_directory(sharded).tokenizer
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    with pytest.raises(WeightsError, match=r"`model-00001-.*` is missing"):
        load(sharded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wider_types_are_rounded_to_bfloat16(directory: Path, dtype: torch.dtype) -> None:
    name = "model.norm.weight"
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rewrite(directory, **{name: drawn})
    assert torch.equal(load(directory)[name], drawn.to(torch.bfloat16))


def test_what_is_wrong_with_a_weight_is_named(directory: Path) -> None:
    name = "model.norm.weight"
    for changed, said in (
        ({name: None}, f"`{name}` is missing"),
        ({name: torch.zeros(63)}, f"`{name}` has shape \\[63\\], not \\[64\\]"),
        ({name: torch.zeros(64, dtype=torch.int8)}, f"`{name}` is torch.int8"),
        ({name: torch.zeros(64), "model.surprise": torch.zeros(1)}, "`model.surprise` is not one"),
    ):
        rewrite(directory, **changed)
        with pytest.raises(WeightsError, match=said):
            load(directory)


def test_a_tied_head_may_be_stored_and_is_not_used(directory: Path) -> None:
    rewrite(directory, **{"lm_head.weight": torch.zeros(384, 64)})
    assert "lm_head.weight" not in load(directory)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"\xff" * 1000])
def test_weights_that_cannot_be_read_are_named(directory: Path, damage: bytes) -> None:
    (directory / "model.safetensors").write_bytes(damage)
    with pytest.raises(WeightsError, match=r"`model.safetensors` cannot be read"):
        load(directory)


def test_weights_cut_short_are_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(WeightsError, match=r"`model.safetensors` cannot be read"):
        load(directory)


def test_an_index_may_not_name_a_file_elsewhere(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="is missing"):
        load(directory)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("model.safetensors", "weights"),
        ("config.json", "config"),
        ("generation_config.json", "config"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_one_changed_byte_changes_the_version_and_its_part(directory: Path, file: str, part: str) -> None:
    before = digest_directory(directory)
    path = directory / file
    path.write_bytes(path.read_bytes() + b" ")
    after = digest_directory(directory)
    changed = {name for name in ("weights", "config", "tokenizer") if getattr(before, name) != getattr(after, name)}
    assert changed == {part}
    assert before.digest != after.digest


def test_the_template_is_part_of_the_version_wherever_it_is_kept(directory: Path) -> None:
    before = digest_directory(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    after = digest_directory(directory)
    assert before.template != after.template
    assert before.digest != after.digest


def test_a_version_has_the_digest_that_it_always_had(tmp_path: Path) -> None:
    """Of files written byte by byte; policies and records name such digests for good."""
    directory = tmp_path / "model"
    directory.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        header = f'{{"{name[6:11]}": {{"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}}}'.encode()
        (directory / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(12)))
    index = {"weight_map": {name[6:11]: name for name in names}}
    files = {
        "model.safetensors.index.json": json.dumps(index),
        "config.json": '{"a": 1}',
        "generation_config.json": '{"eos_token_id": 2}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "factors",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "chat_template.jinja").write_bytes("{{ messages }}\r\nä".encode())  # its lines end as in a text file
    version = digest_directory(directory)
    assert version.weights == "sha256:534ab4c583bfcd3d121744324ae3220929272cf79e57b8a94330e0cd3a7460a6"
    assert version.config == "sha256:1821ec5a88010b8e2d3ea861b9f07c652d29c198658723c832a9489c6b50d721"
    assert version.tokenizer == "sha256:c2402cb4eb9966ec59987648d1d09af40646c08918849f2c42961d1a327d12d8"
    assert version.template == "sha256:6e4e9089a5f055aeb6fcfec35c0c56fb2aa2468e46564a580e1788237e161e69"
    assert version.digest == "sha256:46aad457131ed474b01ea8205b4878bab824ece1d4857a9efc3393fe13ca307f"
    adapted = adapter_version(version, "a", directory)
    assert adapted.digest == "sha256:e7159f33b831d626a88635f79d78b322f83b59e48ccb0068d97b1b0fb95cfbb3"


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_an_index_that_names_no_files_is_named(directory: Path, index: str) -> None:
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=r"`model.safetensors.index.json`"):
        load(directory)


def test_a_directory_that_is_none_or_lacks_a_file_is_named(directory: Path) -> None:
    with pytest.raises(WeightsError, match="is not a directory"):
        digest_directory(directory / "nowhere")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"`tokenizer.json` is missing"):
        digest_directory(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"`config.json` of the model directory is not an object"):
        Reading(directory).json("config.json")
    (directory / "config.json").write_bytes(b"\xff{")
    with pytest.raises(WeightsError, match=r"`config.json` of the model directory cannot be read"):
        Reading(directory).json("config.json")
