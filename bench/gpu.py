"""Everything that needs a GPU in one command: the kernels' tests, then each bench while the time lasts.

    python bench/gpu.py --out DIR [--minutes 9]

The tests gate the benches: with a red test nothing is timed. Headline shapes come first, every table is written to DIR
as soon as it is there (head.json, logits.json, ..., gpu.txt): a run cut short keeps what it has.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from harness import REPOSITORY

SHARES = {"tests": 0.3, "head.py": 0.4, "logits.py": 0.12, "policy_loss.py": 0.09, "group_norm.py": 0.09}
TESTS = (
    "test_policy_loss_kernel.py",
    "test_segment_norm_kernel.py",
    "test_linear_logprob_kernel.py",
    "test_policy_head.py",
    "test_vocabulary_parallel.py",
    "test_dispatch.py",
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = (arguments.out / "gpu.txt").open("w")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")])
    }
    stop = time.monotonic() + 60 * arguments.minutes

    def run(title: str, command: list, seconds: float) -> int:
        """The output goes to the screen and to gpu.txt as it comes; 124 if the time is up."""
        print(f"\n=== {title}", flush=True)
        timed = ["timeout", f"{max(seconds, 1):.0f}", *map(str, command)]
        process = subprocess.Popen(
            timed, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        return process.wait()

    folder = REPOSITORY / "tests/kernels"
    # The kernels need torch, Triton and pytest: conftest.py one folder up imports verl with all it depends on.
    options = ["-q", "-x", f"--confcutdir={folder}"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "8"]  # most of the time is Triton's compiler
    tests = [sys.executable, "-m", "pytest", *options, *(folder / name for name in TESTS)]
    code = run("tests", tests, 60 * arguments.minutes * SHARES["tests"])
    if code:
        sys.exit(f"the kernels' tests returned {code}: nothing is timed")
    for bench in [name for name in SHARES if name != "tests"]:
        left = stop - time.monotonic()
        later = sum(
            share
            for name, share in SHARES.items()
            if name != "tests" and list(SHARES).index(name) > list(SHARES).index(bench)
        )
        mine = left - later * 60 * arguments.minutes
        command = [
            sys.executable,
            REPOSITORY / "bench" / bench,
            "--out",
            arguments.out,
            "--minutes",
            f"{mine / 60 - 0.3:.2f}",
        ]
        run(bench, command, mine)
