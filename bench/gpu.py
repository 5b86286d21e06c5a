"""Runs everything that needs a GPU with one command: the kernels' tests, ceilings, headline shapes, then the sweep.

    python bench/gpu.py --out DIR [--minutes 8] [--write]
    python bench/gpu.py --out DIR --rehearse      the same on a CPU, with tiny shapes and a few of the tests

It needs torch, Triton, pytest and the packages that `run.sh` of `make gpu-bundle` unpacks, and no network; it ends
within the time. Every result is written to DIR at once (gpu.txt, and a JSON file for each bench), and at the end the
table of all results (gpu.md). A peer that is missing or fails is a line of that table. Because GPU time is rare, failed
tests do not stop the run; but then the table starts with them, the exit code is 1, and the times must not be reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from harness import REPOSITORY

TESTS = REPOSITORY / "tests" / "kernels"
# The test of the compiler needs no GPU. The others take minutes under Triton's interpreter, so a rehearsal runs few.
NOT_HERE = ("test_kernels_compile.py", "test_peers.py", "test_page.py")
REHEARSED = (
    "test_launch.py",
    "test_linear_logprob.py",
    "test_policy_head.py::test_every_term_may_be_absent",
    "test_against_liger.py",
)
TIMED_OUT, INTERRUPTED = 124, 2  # exit codes of `timeout` and of pytest


class Stage(NamedTuple):
    """A process, and its share of the time; the time that earlier stages did not use is added."""

    name: str
    share: float
    command: tuple[str, ...]


def stages(options: argparse.Namespace) -> list[Stage]:
    """The stages in order: tests, ceilings, headline shapes, and the sweep."""

    def bench(name: str, share: float, *more: str) -> Stage:
        return Stage(" ".join((name, *more[1:])), share, (f"bench/{name}.py", *more))

    found = [Stage("tests", 0.2, tuple(tests(options)))]
    if (REPOSITORY / "bench" / "launch_settings.py").exists():
        found.append(bench("launch_settings", 0.05, *(["--write"] if options.write else [])))
    found += [
        bench("ceilings", 0.03),
        bench("head", 0.34, "--part", "headline"),
        bench("logits", 0.13),
        bench("policy_loss", 0.1),
        bench("group_norm", 0.08),
        bench("head", 0.07, "--part", "sweep"),
    ]
    return found


def tests(options: argparse.Namespace) -> list[str]:
    """The arguments of pytest."""
    files = [path.name for path in sorted(TESTS.glob("test_*.py")) if path.name not in NOT_HERE]
    chosen = [name for name in REHEARSED if (TESTS / name.split("::")[0]).exists()] if options.rehearse else files
    # The conftest.py in the folder above must not be loaded, since it imports verl and all its dependencies.
    flags = ["-q", "-p", "no:cacheprovider", "--maxfail=20", "--tb=short", "--durations=15"]
    flags.append(f"--confcutdir={TESTS}")
    # Most of the time is Triton's compiler.
    workers = 1 if options.rehearse else min(12, os.cpu_count() or 1)
    return ["-m", "pytest", *flags, *(["-n", str(workers)] if workers > 1 else []), *(str(TESTS / x) for x in chosen)]


class Run:
    """Runs the stages as processes; their output goes to the screen and to gpu.txt at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.without: list[str] = []  # peers that crashed a bench
        self.notes: list[str] = []
        self.last = ""  # line of output
        self._log: TextIO = (self.out / "gpu.txt").open("w")
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        """Write text to the screen and to gpu.txt."""
        print(line, flush=True)
        print(line, file=self._log, flush=True)

    def stage(self, stage: Stage, until: float) -> None:
        """Run a stage until the time `until` (seconds from the start); rerun it without a peer that crashes it."""
        arguments = list(stage.command)
        if stage.name == "tests":
            # So that pytest ends by itself and reports what failed until then.
            arguments += [f"--session-timeout={0.9 * (until - self._now()):.0f}"] if find_spec("pytest_timeout") else []
        else:
            arguments += ["--out", str(self.out)] + (["--smoke"] if self.options.rehearse else [])
        while (left := until - self._now()) > 1:
            minutes = [] if stage.name == "tests" else ["--minutes", f"{0.8 * left / 60:.2f}"]
            without = [part for name in self.without for part in ("--without", name)]
            code = self._process([*arguments, *minutes, *without], left)
            peer = self.out / "running"
            name = peer.read_text() if peer.exists() else ""
            peer.unlink(missing_ok=True)
            if code in (0, TIMED_OUT) or not name or name.startswith("hapo") or stage.name == "tests":
                return self._judge(stage.name, code)
            self.without.append(name)
            self.notes.append(f"{stage.name}: {name} took the process down (exit code {code}); left out from then on")
            self.say(self.notes[-1])
        return self._judge(stage.name, TIMED_OUT)

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _judge(self, name: str, code: int) -> None:
        # Pytest's last line says "2 failed, 30 passed", also where its time was up.
        up = name == "tests" and code == INTERRUPTED and " failed" not in self.last and " error" not in self.last
        if code == TIMED_OUT or up:
            self.notes.append(f"{name}: cut short, its time was up")
        elif code:
            self.notes.append(f"RED: {name} returned {code}; see gpu.txt. Nothing below is to be reported.")

    def _process(self, arguments: list[str], seconds: float) -> int:
        path = [str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        self.say(f"\n=== {' '.join(arguments[:3])}, at most {seconds:.0f} s")
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", f"{seconds:.0f}", sys.executable, *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            self.last = line.rstrip("\n")
            self.say(self.last)
        return process.wait()


def table(out: Path, notes: list[str]) -> str:
    """The table of all cases of all benches in DIR: contenders that ran, the fastest first, then those that did not."""
    lines = ["# One run on this machine", ""]
    lines += [f"- {note}" for note in notes]
    contents = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    contents = {name: content for name, content in contents.items() if "cases" in content}
    if not contents:
        return "\n".join([*lines, "Nothing was measured."])
    machine = next(iter(contents.values()))["machine"]
    lines += ["", " · ".join(f"{key} {value}" for key, value in machine.items() if key != "command")]
    if any(content["smoke"] for content in contents.values()):
        lines += ["", "**Rehearsal: tiny shapes on a CPU. No number below is a speed.**"]
    for name, content in contents.items():
        reached = ", ".join(f"{key} {value:,.1f}" for key, value in content["ceilings"].items())
        lines += ["", f"## {name}", "", f"Ceilings of this process: {reached}", ""]
        lines += ["| case | contender | ms p50 | % of ceiling | peak MiB | x baseline | host ms |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for case in content["cases"]:
            rows = sorted(case["rows"], key=lambda row: (bool(row["note"]), row["ms"]["p50"]))
            lines += [f"| {case['case'] if first else ''} | {cells(row)} |" for first, row in marked(rows)]
    return "\n".join(lines) + "\n"


def marked(rows: list[dict[str, Any]]) -> list[tuple[bool, dict[str, Any]]]:
    """Each row with whether it is the first one."""
    return [(row is rows[0], row) for row in rows]


def cells(row: dict[str, Any]) -> str:
    """The row's cells after the case."""
    if row["note"]:
        return f"{row['name']} | {row['note']} | | | | "
    peak = row["peak_mib"]
    of_peak = "" if peak != peak else f"{peak:.0f}"
    speed = f"{row['ms']['p50']:.3f} | {row['percent']:.1f} | {of_peak} | {row['x_baseline']:.2f}"
    return f"{row['name']} | {speed} | {row['host_ms']:.2f}"


def main() -> None:
    """Run the stages and print the table; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--write", action="store_true", help="put the fastest launch settings into the kernels' table")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes")
    options = parser.parse_args()
    if options.write and options.rehearse:
        parser.error("--write with --rehearse: a rehearsal measures nothing. Use one of them.")
    run, todo = Run(options), stages(options)
    whole = sum(stage.share for stage in todo)
    for done, stage in enumerate(todo, 1):
        run.stage(stage, 60 * options.minutes * sum(stage.share for stage in todo[:done]) / whole)
    text = table(run.out, run.notes)
    (run.out / "gpu.md").write_text(text)
    run.say(f"\n{text}")
    sys.exit(any(note.startswith("RED") for note in run.notes))


if __name__ == "__main__":
    main()
