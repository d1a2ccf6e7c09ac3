"""The device that an engine computes on: found by name, made ready before CUDA starts, tried before anything is served.

    cpu      torch on the CPU
    cuda     the first NVIDIA GPU; cuda:N the one after N others

What a library would choose by itself is settled here and nowhere else: no product splits its sums, none rounds on the
way (`forbid_split_k`). Then every product of the model is tried, gated and not, at those numbers of rows that
`probed_rows` names, and attention at every boundary of tiles and segments. What does not keep a row's bits is replaced
by what does, by shape, and what was chosen stands in the numeric policy; where nothing does, the engine does not start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineStartError, UnsupportedModel
from engine.model_runner import CACHED_AS, InvarianceUnavailable
from engine.models.arithmetic import Adapter
from engine.models.decoder import DecoderConfig
from engine.models.triton_arithmetic import PRODUCTS, DeviceProduct, Shape
from engine.plan import BLOCK_SIZE
from kernels import float8, mixed_attention
from kernels.attention_state import MOST_ELEMENTS
from kernels.grouped import group_rows, grouped_product_triton
from kernels.jit import INTERPRETED, OutOfResources, tl
from kernels.launch import NoLaunch
from kernels.linear import Linear, StartedTooSoon, forbid_split_k, verify_invariance
from kernels.silu_mul import silu_mul, silu_mul_triton

CPU = torch.device("cpu")
LEAST_CAPABILITY = (8, 0)  # of a GPU: bfloat16 products
Use = Callable[[DeviceProduct], Linear]
ATTENTION = {"decode_and_prefill": True, "prefill": False}  # whether lone tokens go apart; the faster first

_cuda: Any = torch.cuda


class DeviceUnavailable(EngineStartError):
    """The device is not there, or cannot be used as it is; the message names it."""


def open_device(name: str | None) -> torch.device:
    """Return the device of that name, ready; without a name a GPU where torch finds one, else the CPU.

    Raises:
        DeviceUnavailable: it is not there, or cannot be used.
    """
    if name == "cpu" or (name is None and not _finds_gpu()):
        return CPU
    return _open_gpu(name or "cuda")


def _finds_gpu() -> bool:
    return bool(torch.version.cuda and _cuda.is_available())


def _open_gpu(name: str) -> torch.device:
    index = int(name.partition(":")[2] or 0)
    if not _finds_gpu():
        raise DeviceUnavailable(f"`{name}` is not there: torch finds no NVIDIA GPU; set `device` to `cpu`")
    if index >= _cuda.device_count():
        raise DeviceUnavailable(f"`{name}` is not there: torch finds {_cuda.device_count()} GPUs, from `cuda:0` on")
    if tl is None or INTERPRETED:
        raise DeviceUnavailable(f"`{name}` needs Triton, and `TRITON_INTERPRET` unset; install it, or choose `cpu`")
    try:
        forbid_split_k()
    except StartedTooSoon as error:
        raise DeviceUnavailable(
            f"`{name}` was used by this process before the engine; load it in a fresh one"
        ) from error
    device = torch.device("cuda", index)
    with named_start(name):
        _cuda.set_device(device)
        one = torch.zeros(1, 2, dtype=torch.bfloat16, device=device)
    if _cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise DeviceUnavailable(f"`{name}` has no products in bfloat16; set `device` to `cpu`")
    with named_build(name):
        silu_mul_triton(one)
    return device


@contextmanager
def named_start(name: str) -> Iterator[None]:
    """Entered around CUDA's start. Raises DeviceUnavailable: it did not start, as where another process has it all."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceUnavailable(
            f"`{name}` cannot be started; see whether another process holds it, or set `device` to `cpu`"
        ) from error


@contextmanager
def named_build(name: str) -> Iterator[None]:
    """Entered around the first kernel, before any is tried for what it computes.

    Raises:
        DeviceUnavailable: none can be built. What a machine lacks for it shows as errors of many kinds.
    """
    try:
        yield
    except Exception as error:
        raise DeviceUnavailable(
            f"Triton cannot build a kernel for `{name}`: it needs a C compiler and Python's headers, and a place to "
            "write (`TRITON_CACHE_DIR`); or set `device` to `cpu`"
        ) from error


@contextmanager
def named_refusals(device: torch.device) -> Iterator[None]:
    """Entered around what is loaded and tried on a device.

    Raises:
        DeviceUnavailable: its memory was not enough, or that of its multiprocessors.
        UnsupportedModel: a size of the model is more than its kernels were written for.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(
            f"`{device}` has not enough memory for the model and `kv_cache_mib` of keys and values; set less"
        ) from error
    except OutOfResources as error:
        raise DeviceUnavailable(
            f"`{device}` has multiprocessors with less memory than the kernels ask for; set `device` to `cpu`"
        ) from error
    except NoLaunch as error:
        raise UnsupportedModel(f"{error}: the model is served on the CPU only; set `device` to `cpu`") from error


def choose_products(
    config: DecoderConfig,
    most_rows: int,
    device: torch.device,
    products: Mapping[str, DeviceProduct] = PRODUCTS,
) -> dict[Shape, str]:
    """Return, for every weight shape (N, K) of the model, the name of the fastest product that is invariant here.

    Raises:
        InvarianceUnavailable: for one of the shapes none is.
    """
    return {
        shape: _choose_product(shape, _uses(config, shape, most_rows), most_rows, device, products)
        for shape in sorted(set(config.linear_shapes()))
    }


def _uses(config: DecoderConfig, shape: Shape, most_rows: int) -> list[Use]:
    """Return how a product is used for weights of a shape: plain, with a bias, gated, and gated beside an adapter."""
    uses: list[Use] = [_plain]
    if config.qkv_bias and shape == (sum(config.qkv_sizes), config.hidden_size):
        uses.append(_biased)
    if shape == (2 * config.intermediate_size, config.hidden_size):
        uses += [_gated, _gated_apart(most_rows)]
    return uses


def _plain(product: DeviceProduct) -> Linear:
    return product.multiply


def _biased(product: DeviceProduct) -> Linear:
    return lambda x, weight, _: product.multiply(x, weight, weight[:, 0].contiguous())  # any numbers are a bias


def _gated(product: DeviceProduct) -> Linear:
    return lambda x, weight, _: product.gate(x, weight)


def _gated_apart(most_rows: int) -> Use:
    """Return a use whose widest product, with which all others are compared, is gated as rows beside an adapter's are:
    the product first, to which the adapter adds, and then the gate."""

    def use(product: DeviceProduct) -> Linear:
        def multiply(x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
            if x.shape[0] > most_rows:
                return silu_mul(product.multiply(x, weight, None))
            return product.gate(x, weight)

        return multiply

    return use


def _choose_product(
    shape: Shape,
    uses: Sequence[Use],
    most_rows: int,
    device: torch.device,
    products: Mapping[str, DeviceProduct],
) -> str:
    cause: RuntimeError | None = None
    for name, product in products.items():
        try:
            if all(verify_invariance(use(product), shape, torch.bfloat16, most_rows, str(device)) for use in uses):
                return name
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the library has none for this shape that does not split its sums
            cause = error
    raise InvarianceUnavailable(
        f"no product of {shape[0]} by {shape[1]} is invariant on `{device}`; answers could not be replayed"
    ) from cause


def choose_attention(
    config: DecoderConfig,
    device: torch.device,
    cached_as: torch.dtype = torch.bfloat16,
    attention: mixed_attention.Attention = mixed_attention.mixed_attention,
) -> str:
    """Return the name of the fastest attention that is invariant here for the model's heads.

    Raises:
        InvarianceUnavailable: none is.
    """
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, apart in ATTENTION.items():
        if mixed_attention.verify_invariance(apart, heads, groups, size, torch.bfloat16, device, cached_as, attention):
            return name
    raise InvarianceUnavailable(f"no attention is invariant on `{device}`; answers could not be replayed")


def verify_device_adapters(adapters: Iterable[Adapter], most_rows: int, device: torch.device) -> None:
    """Return if what adapters add to a row is invariant here.

    Raises:
        InvarianceUnavailable: for one of their shapes it is not.
    """

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        one = group_rows(torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), 1)
        grouped_product_triton(x, weight[None], one, out)
        return out

    factors = {
        factor for one in adapters for layer in one.layers for low in layer.values() for factor in (low.down, low.up)
    }
    for shape in sorted({(factor.shape[0], factor.shape[1]) for factor in factors}):
        if not verify_invariance(multiply, shape, torch.bfloat16, most_rows, str(device)):
            raise InvarianceUnavailable(f"no adapter is invariant on `{device}`; start without `adapters`")


def refuse_cache(
    device: torch.device,
    kv_cache_dtype: str,  # a name of CACHED_AS
    runs_on: Callable[[torch.device], bool] = float8.runs_on,
) -> None:
    """Raises DeviceUnavailable: the device has no instructions for what keys and values would be kept in."""
    if CACHED_AS[kv_cache_dtype] == float8.FLOAT8 and not runs_on(device):
        raise DeviceUnavailable(f"`{device}` cannot read `{kv_cache_dtype}`; set `kv_cache_dtype` to `bfloat16`")


def refuse_too_many_blocks(config: DecoderConfig, blocks: int) -> None:
    """Raises DeviceUnavailable: a layer's keys would be more than a kernel counts."""
    most = (MOST_ELEMENTS - 1) // (BLOCK_SIZE * config.num_key_value_heads * config.head_dim) - 1  # one is nobody's
    if blocks > most:
        raise DeviceUnavailable(f"`kv_cache_mib` makes {blocks} blocks, and a GPU's kernels count to {most}; set less")
