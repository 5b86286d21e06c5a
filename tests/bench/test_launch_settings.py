"""The bench that writes the table of launch settings: a rehearsal on a CPU, and its choice with made-up times."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hapo_kernels.launch import DTYPES, NOT_MEASURED, TABLE, Chosen, Launch, read, write

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import launch_settings

REPOSITORY = Path(__file__).parents[2]
# The table before any measurement: the first candidate of each kernel.
SM_90 = TABLE["sm_90"]._replace(
    chosen={
        kernel: {dtype: Chosen(TABLE["sm_90"].candidates[kernel][0], NOT_MEASURED) for dtype in entries}
        for kernel, entries in TABLE["sm_90"].chosen.items()
    }
)
FRESH = TABLE | {"sm_90": SM_90}
SOURCE = "measured on a machine of this test"


def bench(folder, *options):
    path = os.pathsep.join(filter(None, [str(REPOSITORY / "kernels"), *sys.path]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, REPOSITORY / "bench/launch_settings.py", "--out", folder, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_rehearsal_launches_every_candidate_and_writes_no_table(tmp_path):
    done = bench(tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "launch_settings.json").read_text())
    assert content["smoke"]
    assert content["architecture"] == "sm_90"
    measured = [(row["kernel"], row["dtype"], Launch(*row["launch"])) for row in content["times"]]
    candidates = {
        (kernel, dtype, launch)
        for kernel, entries in SM_90.chosen.items()
        for dtype in entries
        for launch in SM_90.candidates[kernel]
    }
    assert set(measured) == candidates
    assert len(measured) == len(candidates)
    assert not (tmp_path / "launch_table.json").exists()


def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path):
    for options, message in (
        (("--write", "--smoke"), "--write with --smoke: a rehearsal measures nothing. Use one of them."),
        (("--write",), "no GPU: a kernel's speed is measured on one."),
    ):
        done = bench(tmp_path, *options)
        assert done.returncode == 2
        assert message in done.stderr
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
