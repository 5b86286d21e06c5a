"""The bench that writes the table of launch settings: its choice with made-up times. `test_gpu.py` rehearses it."""

import math
import sys
import time
from pathlib import Path

import pytest
import torch

from hapo_kernels.launch import DTYPES, NOT_MEASURED, TABLE, Chosen, read, write

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import launch_settings

# The table before any measurement: the first candidate of each kernel.
SM_90 = TABLE["sm_90"]._replace(
    chosen={
        kernel: {dtype: Chosen(TABLE["sm_90"].candidates[kernel][0], NOT_MEASURED) for dtype in entries}
        for kernel, entries in TABLE["sm_90"].chosen.items()
    }
)
FRESH = TABLE | {"sm_90": SM_90}
SOURCE = "measured on a machine of this test"


def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in (
        (("--write", "--smoke"), "--write with --smoke: a rehearsal measures nothing. Use one of them."),
        (("--write",), "no GPU: a kernel's speed is measured on one."),
    ):
        monkeypatch.setattr(sys, "argv", ["launch_settings.py", "--out", str(tmp_path), *options])
        with pytest.raises(SystemExit, match="2"):
            launch_settings.main()
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def times_of(speeds, monkeypatch, *, deadline=math.inf):
    """The table after a run in which the candidates of a kernel take the times in `speeds`."""
    from hapo_kernels import launch

    def calls(device, dtype, *, tiny):
        assert (device, tiny) == ("cuda:0", False)
        for kernel, entries in SM_90.chosen.items():
            if DTYPES[dtype] in entries:
                yield kernel, DTYPES[dtype], lambda kernel=kernel: kernel

    def timer(call):
        kernel = call()
        return speeds(SM_90.candidates[kernel].index(launch._tried[kernel]))

    monkeypatch.setattr(launch_settings, "calls", calls)
    return launch_settings.run(FRESH, "sm_90", "cuda:0", SOURCE, timer=timer, tiny=False, deadline=deadline)


def test_the_fastest_candidate_is_chosen_and_the_table_names_its_source(monkeypatch, tmp_path):
    table, rows = times_of(lambda number: 1.0 if number == 1 else 2.0, monkeypatch)
    for kernel, entries in table["sm_90"].chosen.items():
        assert set(entries.values()) == {Chosen(SM_90.candidates[kernel][1], SOURCE)}
    assert {name: part for name, part in table.items() if name != "sm_90"} == {
        name: part for name, part in TABLE.items() if name != "sm_90"
    }
    assert sum(row["chosen"] for row in rows) == 13
    write(table, tmp_path / "table.json")
    assert read(tmp_path / "table.json") == table


@pytest.mark.parametrize(("gain", "number"), [(0.01, 0), (0.03, 2)])
def test_an_entry_stays_unless_another_is_faster_by_more_than_noise(gain, number, monkeypatch):
    table, _ = times_of(lambda at: 1.0 - gain * (at == 2), monkeypatch)
    for kernel, entries in table["sm_90"].chosen.items():
        assert {entry.launch for entry in entries.values()} == {SM_90.candidates[kernel][number]}


def test_a_kernel_that_is_not_measured_in_time_keeps_its_entry(monkeypatch):
    table, rows = times_of(lambda _: 1.0, monkeypatch, deadline=time.monotonic() - 1)
    assert not rows
    assert table == FRESH
    assert all(entry.source == NOT_MEASURED for entry in table["sm_90"].chosen["head_row"].values())
