"""Files that are swapped while a model is loaded: the old version with the old weights, or a refusal by name.

`Reading` is attacked by itself in test_reading.py. Here all that is made of a directory is: tokenizer, parameters and
version together, natively, through transformers' code, and of an adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.adapters import AdapterError, load_adapter, load_adapters, read_adapter, version_with
from engine.config import EngineConfig, EngineStartError
from engine.load import load_engine
from engine.models.arithmetic import Adapter
from engine.models.borrowed import build
from engine.models.borrowed_config import BorrowedConfig
from engine.models.decoder import DecoderConfig, parameter_shapes
from engine.reading import Progress, Reading, WeightsError, silently
from engine.request import ModelVersion
from engine.tokenizer import Tokenizer
from engine.weights import digest_directory, load_parameters, load_tensors, read_model, version_of
from tests.support.adapters import write_adapter
from tests.support.file_swaps import SWAPS, At, Swap, aged_copy, grow, rename_over, rewrite_in_place
from tests.support.tiny_families import write_family
from tests.support.tiny_models import write_model

Loaded = tuple[ModelVersion, Mapping[str, Tensor]]
Load = Callable[[Path, Progress], Loaded]


def load_native(directory: Path, progress: Progress) -> Loaded:
    reading = read_model(directory, progress)
    Tokenizer(reading)
    shapes = parameter_shapes(DecoderConfig.from_json(reading.json("config.json")))
    parameters = load_parameters(reading, shapes).tensors
    return version_of(reading), parameters


def load_borrowed(directory: Path, progress: Progress) -> Loaded:
    reading = read_model(directory, progress)
    Tokenizer(reading)
    config = BorrowedConfig.from_json(reading.json("config.json"))
    module = build(config, load_tensors(reading).tensors)
    return version_of(reading), dict(module.named_parameters())


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a model in two shards, of the same shape."""
    root = tmp_path_factory.mktemp("native")
    written = [write_model(root / f"{seed}", "llama", seed, max_shard_size="150KB") for seed in (0, 1)]
    return aged_copy(written[0], root / "old"), written[1]


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("borrowed")
    return aged_copy(write_family(root / "mixtral", "mixtral", max_shard_size="150KB"), root / "old")


def moments(load: Load, directory: Path) -> list[tuple[str, int, int]]:
    progress = At()
    load(directory, progress)
    return progress.told


def is_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def swap_all(directory: Path, other: Path, swap: Swap) -> None:
    for path in sorted(other.iterdir()):
        swap(directory / path.name, path.read_bytes())


def test_every_byte_of_a_version_is_read_once(native: tuple[Path, Path]) -> None:
    told = moments(load_native, native[0])
    for path in native[0].iterdir():
        seen = [done for name, done, _ in told if name == path.name]
        assert seen == sorted(set(seen))
        assert not seen or seen[-1] == path.stat().st_size
    assert sum(name.endswith(".safetensors") and done == size for name, done, size in told) == 2


@pytest.mark.parametrize("swap", [rename_over, rewrite_in_place])
def test_a_version_that_is_put_over_another_while_it_loads_is_refused(
    native: tuple[Path, Path], tmp_path: Path, swap: Swap
) -> None:
    old, new = native
    count = len(moments(load_native, old))
    assert count > 30
    for moment in range(count):
        victim = aged_copy(old, tmp_path / f"{moment}")
        with pytest.raises(WeightsError, match="was changed while it was read"):
            load_native(victim, At(moment, partial(swap_all, victim, new, swap)))
        version, parameters = load_native(victim, silently)  # and, begun again, the new one is served as the new one
        assert version.digest == digest_directory(new).digest
        assert moment or is_same(parameters, load_native(new, silently)[1])


@pytest.mark.parametrize("swap", SWAPS)
def test_one_file_of_a_version_that_is_swapped_while_it_loads_is_refused_by_name(
    native: tuple[Path, Path], tmp_path: Path, swap: Swap
) -> None:
    old, new = native
    told = moments(load_native, old)
    names = sorted({name for name, _, _ in told})
    assert len(names) == 8
    for number, name in enumerate(names):
        first = next(at for at, (file, _, _) in enumerate(told) if file == name)
        for moment in {0, first, first + 1, len(told) - 1}:
            victim = aged_copy(old, tmp_path / f"{number}-{moment}")
            other = (new / name).read_bytes()
            with pytest.raises(WeightsError, match=f"`{name}` was changed while it was read"):
                load_native(victim, At(moment, partial(swap, victim / name, other)))


def test_a_deployment_that_is_switched_while_it_loads_gives_the_old_version_with_the_old_weights(
    native: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = native
    version, parameters = load_native(old, silently)
    for moment in range(0, len(moments(load_native, old)), 5):
        current = tmp_path / f"current-{moment}"
        current.symlink_to(old)

        def switch(current: Path = current) -> None:
            current.unlink()
            current.symlink_to(new)

        found, ours = load_native(current, At(moment, switch))
        assert found == version
        assert is_same(ours, parameters)


def test_what_comes_into_the_directory_while_it_loads_is_not_taken_up(
    native: tuple[Path, Path], tmp_path: Path
) -> None:
    version, parameters = load_native(native[0], silently)
    for number, name in enumerate(("README.md", "another.safetensors")):
        victim = aged_copy(native[0], tmp_path / f"{number}")
        found, ours = load_native(victim, At(3, partial((victim / name).write_text, "beside")))
        assert found.digest == version.digest
        assert is_same(ours, parameters)
    victim = aged_copy(native[0], tmp_path / "template")
    (victim / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match=r"`chat_template.jinja` was changed"):
        load_native(victim, At(3, partial((victim / "chat_template.jinja").write_text, "late")))


def test_weights_of_a_borrowed_family_are_those_that_were_hashed(borrowed: Path, tmp_path: Path) -> None:
    told = moments(load_borrowed, borrowed)
    shards = sorted({name for name, _, _ in told if name.endswith(".safetensors")})
    assert len(shards) > 1
    for swap in (rename_over, rewrite_in_place, grow):
        for name in ("config.json", shards[0], shards[-1]):
            for moment in (0, len(told) // 2, len(told) - 1):
                victim = aged_copy(borrowed, tmp_path / f"{swap.__name__}-{name}-{moment}")
                data = bytes(reversed((victim / name).read_bytes()))
                with pytest.raises(EngineStartError, match=f"`{name}` was changed while it was read"):
                    load_borrowed(victim, At(moment, partial(swap, victim / name, data)))


def test_transformers_reads_no_file_and_nothing_is_held_beside_its_model(borrowed: Path, tmp_path: Path) -> None:
    reading = read_model(aged_copy(borrowed, tmp_path / "victim"), silently)
    config = BorrowedConfig.from_json(reading.json("config.json"))
    tensors = load_tensors(reading).tensors
    shutil.rmtree(reading.directory)
    module = build(config, tensors)
    assert tensors == {}
    assert is_same(dict(module.named_parameters()), load_borrowed(borrowed, silently)[1])


@pytest.mark.parametrize("load", [load_native, load_borrowed])
def test_a_model_is_not_reached_by_what_is_written_to_its_files_afterwards(
    native: tuple[Path, Path], borrowed: Path, tmp_path: Path, load: Load
) -> None:
    victim = aged_copy(borrowed if load is load_borrowed else native[0], tmp_path / "victim")
    _, parameters = load(victim, silently)
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    for path in victim.glob("*.safetensors"):
        rewrite_in_place(path, bytes(path.stat().st_size))
    assert is_same(parameters, before)


# --- adapters ---


@pytest.mark.parametrize("swap", SWAPS)
def test_an_adapter_that_is_swapped_while_it_loads_is_refused_by_name(
    native: tuple[Path, Path], tmp_path: Path, swap: Swap
) -> None:
    model, config, base = native[0], config_of(native[0]), digest_directory(native[0])
    old = aged_copy(write_adapter(tmp_path / "written", model, seed=1), tmp_path / "old")
    new = write_adapter(tmp_path / "new", model, seed=2, lora_alpha=5)
    progress = At()
    load_adapters([("a", old)], config, base, progress)
    for moment in range(0, len(progress.told), 4):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            victim = aged_copy(old, tmp_path / f"{moment}-{file}")
            attack = At(moment, partial(swap, victim / file, (new / file).read_bytes()))
            with pytest.raises(AdapterError, match=f"adapter `a`: `{file}` was changed while it was read"):
                load_adapters([("a", victim)], config, base, attack)


def test_an_adapter_s_version_is_that_of_the_factors_it_adds(native: tuple[Path, Path], tmp_path: Path) -> None:
    config, base = config_of(native[0]), digest_directory(native[0])
    versions, adapters = [], []
    for seed in (1, 2):
        reading = read_adapter(write_adapter(tmp_path / f"{seed}", native[0], seed=seed))
        adapters.append(load_adapter(reading, config))
        versions.append(version_with(base, "a", reading))
    assert versions[0].digest != versions[1].digest
    assert not torch.equal(down(adapters[0]), down(adapters[1]))


def down(adapter: Adapter) -> Tensor:
    return adapter.layers[0]["qkv"].down


def config_of(directory: Path) -> DecoderConfig:
    return DecoderConfig.from_json(Reading(directory).json("config.json"))


# --- the whole engine ---


@pytest.mark.parametrize("moment", [0, -1])
def test_an_engine_whose_files_are_swapped_does_not_start(
    native: tuple[Path, Path], tmp_path: Path, moment: int
) -> None:
    old, new = native
    config = EngineConfig(aged_copy(old, tmp_path / "victim"), threads=1, kv_cache_mib=4)
    at = len(moments(load_native, old)) + moment if moment < 0 else moment
    attack = At(at, partial(swap_all, config.model, new, rename_over))
    with pytest.raises(WeightsError, match="was changed while it was read"):
        load_engine(config, progress=attack)
    assert len(attack.told) > at
