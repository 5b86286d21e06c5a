"""Every device has entries in the table of launch settings, and the table is unchanged by reading and writing."""

import pytest
import torch

from hapo_kernels.launch import (
    DTYPES,
    NOT_MEASURED,
    PATH,
    TABLE,
    Chosen,
    Launch,
    architecture,
    launch_of,
    read,
    trying,
    write,
)

CPU = torch.device("cpu")


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
def test_a_device_takes_the_newest_entry_that_is_not_newer_than_itself(capability, entry):
    assert architecture(*capability) == entry


def test_a_block_is_a_power_of_two_that_fills_its_threads():
    for name, settings in TABLE.items():
        for candidates in settings.candidates.values():
            for block, warps, stages in candidates:
                threads = warps * (64 if name.startswith("gfx") else 32)
                assert block & (block - 1) == 0
                assert block % (4 * threads) == 0, f"{name}: a 128-bit load of fp32 takes 4 elements a thread"
                assert 1 <= stages <= 4


def test_every_architecture_has_a_chosen_candidate_for_every_kernel_and_dtype():
    for settings in TABLE.values():
        assert settings.candidates.keys() == settings.chosen.keys()
        for kernel, candidates in settings.candidates.items():
            assert len(set(candidates)) == len(candidates) > 1
            # The statistics use fp32 logits for every storage dtype.
            assert set(settings.chosen[kernel]) == ({"fp32"} if kernel == "stats_row" else set(DTYPES.values()))
            for chosen in settings.chosen[kernel].values():
                assert chosen.launch in candidates
                assert chosen.source == NOT_MEASURED or chosen.source.startswith("measured on ")


def test_a_table_is_unchanged_by_reading_and_writing(tmp_path):
    path = tmp_path / "table.json"
    write(TABLE, path)
    assert path.read_text() == PATH.read_text()
    assert read(path) == TABLE


def test_a_kernel_and_a_storage_dtype_have_settings_of_their_own(monkeypatch):
    other = Launch(4096, 16, 1)
    chosen = TABLE["sm_90"].chosen
    entry = chosen["head_row"] | {"bf16": Chosen(other, "measured on a machine")}
    monkeypatch.setitem(TABLE, "sm_90", TABLE["sm_90"]._replace(chosen=chosen | {"head_row": entry}))
    assert launch_of("head_row", CPU, torch.bfloat16) == other
    assert launch_of("head_row", CPU, torch.float32) == chosen["head_row"]["fp32"].launch != other
    assert launch_of("dlogits_row", CPU, torch.bfloat16) == chosen["dlogits_row"]["bf16"].launch != other


def test_trying_a_candidate_changes_only_its_kernel_and_ends_afterwards():
    other, chosen = Launch(4096, 16, 1), TABLE["sm_90"].chosen

    def fails():
        with trying("stats_row", other):
            assert launch_of("stats_row", CPU, torch.float32) == other
            assert launch_of("head_row", CPU, torch.float32) == chosen["head_row"]["fp32"].launch != other
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fails()
    assert launch_of("stats_row", CPU, torch.float32) == chosen["stats_row"]["fp32"].launch != other
