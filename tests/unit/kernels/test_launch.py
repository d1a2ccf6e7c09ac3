"""The launch table: the first entry that fits, the device's own before anybody's."""

from __future__ import annotations

import pytest
import torch

from kernels.launch import ANY, TABLE, Launch, NoLaunch, device_of, launch_for, power_of_two


def test_a_size_gets_the_narrowest_entry_that_holds_it() -> None:
    assert launch_for("rms_norm", 1024, ANY) != launch_for("rms_norm", 1025, ANY)
    assert launch_for("rms_norm", 1, "sm_90") == launch_for("rms_norm", 1024, ANY)


def test_what_the_table_does_not_hold_is_named() -> None:
    with pytest.raises(NoLaunch, match="`rms_norm` has no entry"):
        launch_for("rms_norm", 1 << 20, ANY)
    with pytest.raises(NoLaunch, match="`unheard_of`"):
        launch_for("unheard_of", 1, ANY)


def test_entries_of_an_operation_stand_in_order_of_size() -> None:
    for operation, device in {(entry.operation, entry.device) for entry in TABLE}:
        sizes = [entry.at_most for entry in TABLE if (entry.operation, entry.device) == (operation, device)]
        assert sizes == sorted(set(sizes))


def test_every_launch_is_one_that_triton_takes_and_nothing_is_contracted() -> None:
    for entry in TABLE:
        numbers = (entry.launch.warps, entry.launch.block_m, entry.launch.block_n, entry.launch.block_k)
        assert all(number & (number - 1) == 0 for number in numbers)
        assert entry.launch.options["enable_fp_fusion"] is False


def test_blocks_are_powers_of_two_that_hold_the_size() -> None:
    assert [power_of_two(size) for size in (1, 16, 17, 80, 128, 129)] == [16, 16, 32, 128, 128, 256]
    assert [power_of_two(size, least=1) for size in (1, 2, 3, 16)] == [1, 2, 4, 16]


def test_a_tensor_on_the_host_is_on_no_device_of_its_own() -> None:
    assert device_of(torch.zeros(1)) == ANY
    assert Launch(warps=4, stages=1).options["num_warps"] == 4
