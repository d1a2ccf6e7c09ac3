"""The steps by which a device is warmed up: as wide as a step may be, and one for every launch that adapters have."""

from __future__ import annotations

import pytest

from engine.device_runner import adapter_steps, widest_step
from engine.plan import BLOCK_SIZE
from kernels.launch import ANY, TABLE, launch_for


@pytest.mark.parametrize("most_rows", [1, 15, 16, 17, 512, 1000])
def test_the_widest_step_wishes_for_everything_at_as_many_tokens_as_there_may_be(most_rows: int) -> None:
    plan = widest_step(most_rows)
    assert plan.token_count == most_rows
    assert sum(len(row.draws) for row in plan.rows) == most_rows
    assert all(row.context_length <= BLOCK_SIZE for row in plan.rows)  # what is stored lies in the first block
    assert all(row.sampling.looks_back and row.sampling.top_p < 1 and row.sampling.logit_bias for row in plan.rows)


def test_warming_up_meets_every_launch_of_the_adapters_kernel_that_a_step_may_have() -> None:
    every = {entry.launch for entry in TABLE if entry.operation == "gemm"}
    for most_rows, reached in ((600, every), (40, {launch_for("gemm", 1, ANY)})):
        for kind in (("a", "b", "c"), ("a",)):
            plans = adapter_steps([kind], most_rows)
            assert all(plan.token_count <= most_rows for plan in plans)
            assert {row.adapter for plan in plans for row in plan.rows} == {"a"}
            launches = {launch_for("gemm", -(-plan.token_count // len(kind)), ANY) for plan in plans}
            assert launches >= reached
    assert adapter_steps([], 600) == []
