"""Every kernel, dtype and candidate of the launch table compiles without a GPU: no spills, little shared memory, wide loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hapo_kernels.launch import TABLE

HERE = Path(__file__).parent
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Rows of these kernels are aligned with vector loads; segments and gathered rows start anywhere, loaded by element.
WIDE = ("policy_loss", "stats_row", "dlogits_row", "head_row", "upstream")
REGISTER_LIMIT = 128


# A target takes minutes: `make test` compiles for the one that the kernels are tuned for, in bf16, which models are
# trained in; `make test-long` compiles for all, in every dtype.
FEW = ("sm_90", ("bf16",))
ALL = [
    (target, more) for target in TABLE for more in ((("fp32", "fp16") if target == "sm_90" else ()), ("--candidates",))
]


@pytest.mark.parametrize(("target", "more"), [FEW, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL)])
def test_every_kernel_compiles(target, more, tmp_path, capsys):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py", target, *more],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    builds = [json.loads(line) for line in run.stdout.splitlines()]
    with capsys.disabled():
        print(
            f"\n{'kernel':40} {'launch':14} {'dtype':5} {'target':7} registers  spills  shared B  64-bit  128-bit loads"
        )
        for build in builds:
            print(
                f"{build['kernel']:40} {build['launch']!s:14} {build['dtype']:5} {target:7} {build['registers']:9} {build['spills']:7} "
                f"{build['shared']:9} {build['loads_64']:7} {build['loads_128']:14}"
            )
    assert builds
    for build in builds:
        assert build["spills"] == 0, build
        assert build["registers"] <= REGISTER_LIMIT, build
        assert build["shared"] <= SHARED_LIMIT[target], build
        if build["kernel"].startswith(WIDE):
            # With 4 tokens per thread, values of 16 bits are loaded with 64-bit loads.
            half = target == "gfx942" and build["dtype"] != "fp32" and build["kernel"].startswith("policy_loss")
            assert build["loads_64" if half else "loads_128"] > 0, build
