"""Two processes that share the rows of a group give the same weights as one process with all rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed; it has an environment of its own, see the Makefile")
import torch

SCRIPT = Path(__file__).with_name("step_process.py")


def test_two_processes_give_the_result_of_one(tmp_path):
    found = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.pt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
        subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), str(output)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            check=True,
            timeout=900,
        )
        found.append(torch.load(output))
    one, two = found
    assert one.pop("rows") == two.pop("rows")
    assert one.pop("injected") == two.pop("injected")
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
