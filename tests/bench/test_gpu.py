"""The command for a GPU machine, rehearsed on a CPU: from its folder, with only the packages of that machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from hapo_kernels.launch import TABLE, Launch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import gpu
import gpu_bundle

THERE = ("torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist", "hypothesis", "jaxtyping", "setuptools")
HEADS = {"hapo policy_head", "hapo linear_logprob + loss", "torch eager", "flash-attn cross entropy", "Apple CCE"}
CRASHING = "import os\nos._exit(134 if '/site-packages/' in __file__ else 3)\n"


def with_what_they_need(names):
    """The distributions and all their requirements (without extras) that are installed here."""
    found, queue = {}, list(names)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # It is for another platform.
        wanted = [line for line in found[name].requires or [] if "extra ==" not in line]
        queue += [re.split(r"[^\w.-]", line)[0].lower() for line in wanted]
    return found.values()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that sees only the packages of the GPU machine: no verl, no Ray, no vLLM."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for distribution in with_what_they_need(THERE):
        for file in distribution.files or []:
            target = site / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(file.parts[0]))))
    missing = "import importlib.util as u; print(*[n for n in ('verl', 'ray', 'vllm', 'datasets') if u.find_spec(n)])"
    said = subprocess.run([folder / "bin/python", "-c", missing], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ""
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def rehearsal(python, tmp_path_factory):
    """Output, folder of results and exit code of a rehearsal in which a peer crashes the process.

    The peer comes as a large wheel in parts; of another large wheel a part is missing.
    """
    folder, out = tmp_path_factory.mktemp("carried"), tmp_path_factory.mktemp("out")
    assert gpu_bundle.bundle(folder, []) < 2
    wheels = [out / name for name in ("flash_attn-1-py3-none-any.whl", "halved-1-py3-none-any.whl")]
    for wheel in wheels:
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"{wheel.name.split('-')[0]}/__init__.py", CRASHING)
    written = gpu_bundle.parts(folder, wheels, 100)
    assert len(written) > 3
    assert sum(file.stat().st_size for part in written for file in part.iterdir()) == sum(
        wheel.stat().st_size for wheel in wheels
    )
    shutil.rmtree(written[-1])
    environment = {
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "HOME": str(out),
        "OUT": str(out),
        "LIMIT_S": "1450",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", folder / "run.sh", "--rehearse", "--minutes", "24"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr, out, run.returncode


def test_the_command_ends_well_with_its_table_last(rehearsal):
    printed, out, code = rehearsal
    assert code == 0, printed[-3000:]
    assert "halved-1-py3-none-any.whl: left out, it cannot be unpacked; is a part missing?" in printed
    assert " passed" in printed
    order = ["=== -m pytest", "=== bench/ceilings.py", "=== bench/head.py --part headline", "=== bench/logits.py"]
    order += ["=== bench/policy_loss.py", "=== bench/group_norm.py", "=== bench/head.py --part sweep", "# One run"]
    places = [printed.index(part) for part in order]
    assert places == sorted(places)
    assert printed.rstrip().endswith((out / "gpu.md").read_text().rstrip())
    assert (out / "gpu.md").read_text().rstrip() in (out / "gpu.txt").read_text()


def test_a_peer_that_crashes_the_process_loses_only_its_own_row(rehearsal):
    _, out, _ = rehearsal
    table = (out / "gpu.md").read_text()
    assert "- head headline: flash-attn cross entropy took the process down (exit code 134); left out" in table
    assert "| flash-attn cross entropy | left out: an earlier case died in it, or waited 60 s for it |" in table
    # The crash was remembered after the first bench: no later bench started this peer again.
    assert table.count("took the process down") == 1


@pytest.mark.parametrize(
    ("bench", "cases"), [("head", 3), ("head-sweep", 1), ("logits", 2), ("policy_loss", 1), ("group_norm", 3)]
)
def test_a_bench_times_ours_and_names_every_peer(rehearsal, bench, cases):
    _, out, _ = rehearsal
    content = json.loads((out / f"{bench}-smoke.json").read_text())
    table = (out / "gpu.md").read_text()
    assert content["smoke"]
    assert content["machine"]["commit"]
    assert len(content["cases"]) == cases
    for case in content["cases"]:
        assert f"| {case['case']} |" in table
        for row in case["rows"]:
            assert f"| {row['name']} |" in table
            assert row["note"] or row["calls"] >= 2, row
            if row["name"].startswith("hapo"):
                assert not row["note"], row
                assert all(error < 1e-5 for error in row["error"].values()), row
                assert row["error"], row
        if bench.startswith("head"):
            assert {row["name"] for row in case["rows"]} >= HEADS


def test_the_launch_settings_of_every_candidate_are_timed_and_no_table_is_written(rehearsal):
    _, out, _ = rehearsal
    content = json.loads((out / "launch_settings.json").read_text())
    assert content["smoke"]
    assert content["architecture"] == "sm_90"
    measured = [(row["kernel"], row["dtype"], Launch(*row["launch"])) for row in content["times"]]
    table = TABLE["sm_90"]
    candidates = {
        (kernel, dtype, launch)
        for kernel, entries in table.chosen.items()
        for dtype in entries
        for launch in table.candidates[kernel]
    }
    assert set(measured) == candidates
    assert len(measured) == len(candidates)
    assert not (out / "launch_table.json").exists()


def test_failed_tests_are_the_tables_first_line(tmp_path):
    options = type("Options", (), {"out": tmp_path, "rehearse": True, "minutes": 1})
    run = gpu.Run(options)
    run.stage(gpu.Stage("tests", 1.0, ("-c", "print('1 failed'); raise SystemExit(1)")), 60)
    run.stage(gpu.Stage("head", 1.0, ("-c", "import time; time.sleep(60)")), 4)
    assert run.notes == [
        "RED: tests returned 1; see gpu.txt. Nothing below is to be reported.",
        "head: cut short, its time was up",
    ]
    assert gpu.table(tmp_path, run.notes).splitlines()[2] == f"- {run.notes[0]}"
    assert "1 failed" in (tmp_path / "gpu.txt").read_text()


@pytest.mark.parametrize(
    ("last", "note"),
    [
        ("30 passed in 60.00s", "tests: cut short, its time was up"),
        ("2 failed, 30 passed in 60.00s", "RED: tests returned 2; see gpu.txt. Nothing below is to be reported."),
    ],
)
def test_tests_that_run_out_of_time_are_red_only_if_one_has_failed(tmp_path, last, note):
    run = gpu.Run(type("Options", (), {"out": tmp_path, "rehearse": True, "minutes": 1}))
    run.stage(gpu.Stage("tests", 1.0, ("-c", f"print({last!r}); raise SystemExit({gpu.INTERRUPTED})")), 60)
    assert run.notes == [note]


def test_a_folder_that_is_too_large_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "peer-1-py3-none-any.whl").write_bytes(b"0" * 2**20)
    monkeypatch.setattr(gpu_bundle, "MOST_MIB", 1)
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--wheels", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"out: 1\.\d MiB: at most 1 can be carried\. Take wheels away\."):
        gpu_bundle.main()
    # The folder contains the tracked files, including kernels and tests.
    assert (tmp_path / "out/kernels/hapo_kernels/launch.py").exists()
    assert (tmp_path / "out/tests/kernels/exactness.py").exists()
    assert os.access(tmp_path / "out/run.sh", os.R_OK)
