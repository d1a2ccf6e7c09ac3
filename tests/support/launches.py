"""Every launcher of ours called for a GPU that is not there: what it hands over is compiled and checked, and never run.

    python -m tests.support.launches          one line for each launch: `_decode_kernel (3, 2, 4)`

Triton asks its driver for the device, binds the arguments, compiles, and hands the binary and the arguments to the
driver. This driver says sm_90, and holds every argument against the type that its kernel was compiled for, as CUDA's
would: an argument that may be None, but was declared a number, fails here and not in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from engine.device_runner import DeviceRunner, warming_steps
from engine.models.decoder import Decoder
from engine.models.triton_arithmetic import TritonArithmetic
from engine.plan import Pool, RowPlan, Score, StepPlan
from engine.request import Pooling, SamplingParams
from kernels.attention_state import FULL, AttentionVariant
from kernels.decode_attention import decode_attention_triton
from kernels.experts import combine_triton
from kernels.float8 import FLOAT8
from kernels.gemm import gemm, gemm_silu_mul
from kernels.grouped import group_rows, group_rows_triton, grouped_product_triton
from kernels.jit import INTERPRETED
from kernels.logprobs import logprobs_triton
from kernels.low_rank import LowRankStack, add_low_rank_batch_triton
from kernels.prefill_attention import prefill_attention_triton
from kernels.prepare import SequenceTables, Step, advance_triton, prepare_triton
from kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
from kernels.rope_store import HeadNorm, rope_store_triton
from kernels.route import route_triton
from kernels.sample import Bias, Cuts, Penalties, SamplingTables, sample_triton
from kernels.silu_mul import silu_mul_triton
from tests.support.device_engine import TINY, adapter_of, config_of, parameters_of

MOST_SHARED = 232_448  # bytes of a program on sm_90


class HeadlessDriver:
    """What Triton asks of a driver, for one Hopper GPU."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MOST_SHARED}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads: the report knows better

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*given: Any) -> None:
            grid, arguments = given[:3], given[9:]  # between: stream, function, metadata, hooks
            for (name, type_), argument in zip(source.signature.items(), arguments, strict=True):
                if not accepts(type_, argument):
                    raise TypeError(f"`{name}` of `{metadata.name}` is {argument!r}, compiled for {type_}")
            print(metadata.name, grid, flush=True)

        return launch


def accepts(type_: str, argument: object) -> bool:
    """Return whether CUDA's launcher would take `argument` for `type_`, such as `*bf16`, `i32` or `constexpr`."""
    if type_ == "constexpr":
        return True
    if type_.startswith("*"):
        return isinstance(argument, Tensor)
    return isinstance(argument, (int, float) if type_.startswith("fp") else int)


def elementwise() -> None:
    x, weight = torch.zeros(3, 80).bfloat16(), torch.zeros(80).bfloat16()
    rms_norm_triton(x, weight, 1e-6)
    add_rms_norm_triton(x, x, weight, 1e-6)
    silu_mul_triton(x)
    cache = torch.zeros(2, 16, 1, 20).bfloat16()
    angle, at = torch.zeros(9, 10), torch.zeros(3, dtype=torch.long)
    for norm in (None, HeadNorm(weight[:20], weight[:20], 1e-6)):
        for of_cache in (cache, cache.to(FLOAT8)):
            rope_store_triton(x, norm, angle, angle, at, at, of_cache, of_cache)


def attention() -> None:
    query, cache = torch.zeros(3, 4, 80).bfloat16(), torch.zeros(2, 16, 2, 80).bfloat16()
    table, lengths = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    starts = torch.arange(4, dtype=torch.int32)
    sinks = torch.zeros(4)
    for variant in (FULL, AttentionVariant(window=1), AttentionVariant(window=32, soft_cap=30.0, sinks=sinks)):
        for of_cache in (cache, cache.to(FLOAT8)):
            decode_attention_triton(query, of_cache, of_cache, table, lengths, 0.1, variant)
            decode_attention_triton(query, of_cache, of_cache, table, lengths, 0.1, variant, torch.zeros(3, 2).int())
            prefill_attention_triton(query, of_cache, of_cache, table, starts, lengths, 0.1, variant)


def products() -> None:
    x, weight, bias = torch.zeros(3, 80).bfloat16(), torch.zeros(48, 80).bfloat16(), torch.zeros(48).bfloat16()
    for rows in (x[:1], x, x.repeat(6, 1), x.repeat(30, 1)):
        gemm(rows, weight)
        gemm(rows, weight, bias)
        gemm_silu_mul(rows, weight)
    groups = group_rows(torch.tensor([0, 1, 1]), 2)
    grouped_product_triton(x, weight.repeat(2, 1, 1), groups, torch.zeros(3, 24).bfloat16(), silu=True)
    stack = LowRankStack(torch.zeros(2, 4, 80).bfloat16(), torch.zeros(2, 48, 4).bfloat16())
    add_low_rank_batch_triton(torch.zeros(3, 48).bfloat16(), x, groups, stack)
    for scores in (torch.zeros(3, 5).bfloat16(), torch.zeros(3, 40)):
        chosen, _ = route_triton(scores, 2, over_chosen=True)
        group_rows_triton(chosen.view(-1), scores.shape[1])
        route_triton(scores, 2, over_chosen=False)
    combine_triton(torch.zeros(3, 2, 80).bfloat16(), torch.zeros(3, 2))


def vocabulary() -> None:
    logits, request, at = torch.zeros(2, 70), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.long)
    one = torch.ones(2, dtype=torch.float64)
    ids, history = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 70, dtype=torch.int32)
    cuts, penalties = Cuts(request, one, one), Penalties(history, one, one, one)
    sample_triton(logits, request, at, SamplingTables(one, at))
    sample_triton(logits, request, at, SamplingTables(one, at, cuts=cuts))
    bias = Bias(ids, torch.zeros(2, 3).double())
    sample_triton(logits, request, at, SamplingTables(one, at, bias, penalties, ids, cuts))
    for alternatives in (0, 5):
        logprobs_triton(logits, at, alternatives)


def steps() -> None:
    one, table = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 9, dtype=torch.int32)
    step = Step(one, torch.arange(3, dtype=torch.int32))
    for history in (None, table):
        tables = SequenceTables(table, one, one, table, history)
        prepare_triton(tables, step, 2, 16, 0)
        advance_triton(tables, step, one, torch.zeros(2, dtype=torch.long))


def engine() -> None:
    """An engine's steps of every kind on a device without data: torch refuses a tensor of the host among its own."""
    device, plans = torch.device("meta"), list(warming_steps())
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=1)
    for pooling in Pooling:
        rows = [
            RowPlan((1,) * (1 + 35 * at), 0, (0, 1, 2, 3, 4), greedy, (), (Score(0, 1),), Pool(pooling, None), name)
            for at, name in enumerate(("a", None, "b"))
        ]
        plans.append(StepPlan(tuple(rows)))
    for family in ("qwen2", "qwen3"):
        config = config_of(family, TINY)
        arithmetic = TritonArithmetic(device, dict.fromkeys(config.linear_shapes(), "by_rows"), decodes_apart=True)
        adapters = {name: adapter_of(config, 1, 3, ("qkv", "gate_up")) for name in "ab"}
        runner = DeviceRunner(Decoder(config, parameters_of(config), arithmetic), arithmetic, 8, adapters)
        for plan in plans:
            with suppress(NotImplementedError):  # at the copy back: there is nothing to copy
                runner.run(plan)
                raise AssertionError("a step without data came to its end")


def main() -> None:
    if INTERPRETED:
        raise SystemExit("unset `TRITON_INTERPRET`: the interpreter launches nothing")
    triton.runtime.driver.set_active(HeadlessDriver())
    elementwise()
    attention()
    products()
    vocabulary()
    steps()
    engine()


if __name__ == "__main__":
    main()
