"""Every device finds its row in the table of launch settings."""

import pytest

from hapo_kernels.launch import TABLE, architecture


@pytest.mark.parametrize(
    ("capability", "entry"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_100"),
    ],
)
def test_a_device_takes_the_newest_entry_that_is_not_newer(capability, entry):
    assert architecture(*capability) == entry


def test_a_block_is_a_power_of_two_that_fills_its_threads():
    for name, launches in TABLE.items():
        for block, warps in launches:
            threads = warps * (64 if name.startswith("gfx") else 32)
            assert block & (block - 1) == 0
            assert block % (4 * threads) == 0, f"{name}: a 128-bit load of fp32 takes 4 elements a thread"
