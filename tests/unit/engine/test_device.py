"""A device by its name, and what is chosen for it. No GPU is needed, and where there is one nothing here starts it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import ConfigError, EngineConfig, UnsupportedModel
from engine.device import (
    CPU,
    DeviceUnavailable,
    choose_products,
    named_build,
    named_refusals,
    named_start,
    open_device,
    refuse_cache,
    refuse_too_many_blocks,
)
from engine.load import load_engine
from engine.model_loading import load_device_model
from engine.model_runner import InvarianceUnavailable
from engine.models.triton_arithmetic import DeviceProduct
from engine.numeric_policy import device_policy, digest
from engine.reading import Reading
from kernels.jit import OutOfResources
from kernels.linear import linear_fixed_tiles
from kernels.silu_mul import silu_mul
from tests.support.device_engine import TINY, config_of

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
CONFIG = config_of("qwen3", TINY)
PRODUCTS = {(128, 32): "by_rows", (80, 32): "triton"}


def fixed_gate(x: Tensor, weight: Tensor) -> Tensor:
    return silu_mul(linear_fixed_tiles(x, weight))


def leaning(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_fixed_tiles(x, weight, bias) + x.shape[0]


FIXED = DeviceProduct(linear_fixed_tiles, fixed_gate)


def test_the_cpu_is_there_by_its_name() -> None:
    assert open_device("cpu") == CPU


@no_gpu
def test_without_a_gpu_no_name_means_the_cpu() -> None:
    assert open_device(None) == CPU


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_a_device_that_is_not_there_refuses_to_start_by_name(name: str, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(DeviceUnavailable, match=f"`{name}` is not there"):
        load_engine(EngineConfig(tiny_models["llama"], device=name))


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:01", "CPU", "cpu:0", "cuda:1000"])
def test_what_names_no_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="`device`"):
        EngineConfig(Path("model"), device=name)


def test_a_shape_whose_faster_product_leans_goes_by_another() -> None:
    def leaning_when_wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (leaning if weight.shape[0] == TINY.vocab else linear_fixed_tiles)(x, weight, bias)

    products = {"fast": DeviceProduct(leaning_when_wide, fixed_gate), "sure": FIXED}
    chosen = choose_products(CONFIG, 64, CPU, products)
    assert set(chosen) == set(CONFIG.linear_shapes())
    assert {shape for shape, name in chosen.items() if name == "sure"} == {(TINY.vocab, TINY.hidden)}


def test_a_gate_that_leans_takes_its_product_with_it() -> None:
    def gate(x: Tensor, weight: Tensor) -> Tensor:
        return fixed_gate(x, weight) + x.shape[0]

    products = {"fast": DeviceProduct(linear_fixed_tiles, gate), "sure": FIXED}
    chosen = choose_products(CONFIG, 64, CPU, products)
    assert {shape for shape, name in chosen.items() if name == "sure"} == {(2 * TINY.inner, TINY.hidden)}


def test_a_gate_that_opens_otherwise_beside_an_adapter_takes_its_product_with_it() -> None:
    """Rows beside an adapter's are multiplied first and gated then; rows among themselves are gated on the way out."""

    def gate(x: Tensor, weight: Tensor) -> Tensor:
        return fixed_gate(x, weight) * 1.01

    products = {"fast": DeviceProduct(linear_fixed_tiles, gate), "sure": FIXED}
    chosen = choose_products(CONFIG, 64, CPU, products)
    assert {shape for shape, name in chosen.items() if name == "sure"} == {(2 * TINY.inner, TINY.hidden)}


def test_a_bias_that_leans_takes_its_product_with_it() -> None:
    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_fixed_tiles(x, weight, bias) if bias is None else leaning(x, weight, bias)

    config = config_of("qwen2", TINY)
    products = {"fast": DeviceProduct(multiply, fixed_gate), "sure": FIXED}
    chosen = choose_products(config, 64, CPU, products)
    assert {shape for shape, name in chosen.items() if name == "sure"} == {(sum(config.qkv_sizes), TINY.hidden)}


def test_a_product_that_the_library_refuses_is_not_taken() -> None:
    def refusing(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise RuntimeError("no algorithm")

    products = {"fast": DeviceProduct(refusing, fixed_gate), "sure": FIXED}
    assert set(choose_products(CONFIG, 64, CPU, products).values()) == {"sure"}
    with pytest.raises(InvarianceUnavailable):
        choose_products(CONFIG, 64, CPU, {"fast": DeviceProduct(refusing, fixed_gate)})


def test_where_every_product_leans_nothing_starts() -> None:
    with pytest.raises(InvarianceUnavailable, match="`cpu`; answers could not be replayed"):
        choose_products(CONFIG, 64, CPU, {"leaning": DeviceProduct(leaning, fixed_gate)})


def test_more_blocks_than_a_kernel_counts_are_refused_by_name() -> None:
    most = 2**31 // (16 * TINY.groups * TINY.head) - 2
    refuse_too_many_blocks(CONFIG, most)
    with pytest.raises(DeviceUnavailable, match=f"`kv_cache_mib` makes {most + 1} blocks"):
        refuse_too_many_blocks(CONFIG, most + 1)


def test_a_gpu_that_cannot_read_float8_refuses_such_a_cache_by_name() -> None:
    older = torch.device("cuda", 0)
    refuse_cache(older, "bfloat16", runs_on=lambda device: False)
    refuse_cache(older, "fp8_e4m3", runs_on=lambda device: True)
    with pytest.raises(DeviceUnavailable, match="`cuda:0` cannot read `fp8_e4m3`; set `kv_cache_dtype`"):
        refuse_cache(older, "fp8_e4m3", runs_on=lambda device: False)


def test_a_machine_that_cannot_build_a_kernel_says_what_it_lacks() -> None:
    for lacking in (RuntimeError("no C compiler"), subprocess.CalledProcessError(1, "cc"), PermissionError()):
        said = "cannot build a kernel for `cuda`: it needs a C compiler"
        with pytest.raises(DeviceUnavailable, match=said), named_build("cuda"):
            raise lacking


def test_a_gpu_that_does_not_start_or_is_too_small_for_a_kernel_is_refused_by_name() -> None:
    with pytest.raises(DeviceUnavailable, match="`cuda:1` cannot be started"), named_start("cuda:1"):
        raise RuntimeError("busy or unavailable")
    said = "`cuda:0` has multiprocessors with less memory"
    with pytest.raises(DeviceUnavailable, match=said), named_refusals(torch.device("cuda", 0)):
        raise OutOfResources(131_072, 101_376, "shared memory")


def test_a_family_of_transformers_is_refused_on_a_gpu_by_name(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    values = json.loads((tiny_models["mistral"] / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values | {"sliding_window": 64}))
    with pytest.raises(UnsupportedModel, match="`MistralForCausalLM` is served on the CPU only"):
        load_device_model(Reading(tmp_path), 64, torch.device("cuda", 0))


def test_everything_that_was_chosen_is_in_the_policy_of_a_device() -> None:
    policies = [
        device_policy(CPU, PRODUCTS, "decode_and_prefill", {}),
        device_policy(CPU, {**PRODUCTS, (80, 32): "by_rows"}, "decode_and_prefill", {}),
        device_policy(CPU, PRODUCTS, "prefill", {}),
        device_policy(CPU, PRODUCTS, "prefill", {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "HOME": "here"}),
        device_policy(CPU, PRODUCTS, "prefill", {"MKL_CBWR": "COMPATIBLE"}),  # of the host, which makes the rotations
        device_policy(CPU, PRODUCTS, "prefill", {"PTXAS_OPTIONS": "-O0"}),
    ]
    assert len({digest(policy) for policy in policies}) == len(policies)
    assert policies[3]["environment"] == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    assert digest(policies[0]) == digest(device_policy(CPU, dict(reversed(PRODUCTS.items())), "decode_and_prefill", {}))
    for name in ("triton", "torch", "kernels", "arithmetic", "launches", "attention_tile", "dtype"):
        assert policies[0][name]
