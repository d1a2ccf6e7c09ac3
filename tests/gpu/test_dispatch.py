"""On a GPU the public functions go by the kernels. The interpreter, whose tensors lie on the host, cannot show it."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_state import FULL
from kernels.decode_attention import decode_attention, decode_attention_triton
from kernels.jit import INTERPRETED
from kernels.prefill_attention import prefill_attention, prefill_attention_triton
from kernels.rms_norm import add_rms_norm, add_rms_norm_triton, rms_norm, rms_norm_triton
from kernels.rope_store import rope_store, rope_store_triton
from kernels.silu_mul import silu_mul, silu_mul_triton

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's tensors lie on the host")


def test_norms_and_gates_go_by_their_kernels(device: torch.device, generator: torch.Generator) -> None:
    x, residual = (torch.randn(5, 896, generator=generator).to(device).bfloat16() for _ in "xr")
    weight = torch.randn(896, generator=generator).to(device).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_triton(x, weight, 1e-6))
    assert torch.equal(silu_mul(x), silu_mul_triton(x))
    for ours, theirs in zip(
        add_rms_norm(x, residual, weight, 1e-6), add_rms_norm_triton(x, residual, weight, 1e-6), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_rotation_and_attention_go_by_their_kernels(device: torch.device, generator: torch.Generator) -> None:
    qkv = torch.randn(40, 8 * 64, generator=generator).to(device).bfloat16()
    angles = torch.randn(2, 40, 32, generator=generator).to(device)
    at = torch.arange(40, device=device)
    ours, theirs = ([torch.zeros(3, 16, 2, 64, device=device).bfloat16() for _ in "kv"] for _ in range(2))
    query = rope_store(qkv, None, *angles, at, at, *ours)
    assert torch.equal(query, rope_store_triton(qkv, None, *angles, at, at, *theirs))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    length, starts = (torch.tensor(counts, dtype=torch.int32, device=device) for counts in ([40], [0, 40]))
    whole = prefill_attention(query, *ours, table, starts, length, 0.125)
    assert torch.equal(whole, prefill_attention_triton(query, *ours, table, starts, length, 0.125, FULL))
    last = decode_attention(query[-1:], *ours, table, length, 0.125)
    assert torch.equal(last, decode_attention_triton(query[-1:], *ours, table, length, 0.125, FULL))
    assert torch.equal(last[0], whole[-1])
