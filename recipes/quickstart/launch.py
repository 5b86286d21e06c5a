"""Runs `python -m verl.trainer.main_ppo` as a child process with a log file, progress, and a time limit.

verl prints thousands of lines, so the child's output goes to a log, and progress is read from verl's `file` logger. If
a worker dies during a weight sync, the trainer may wait for ever, so after a time limit the child and all processes
that it started are ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30

# Lines of verl's log that mark the phases of the start-up.
PHASES = (
    ("Started a local Ray instance", "Ray is up"),
    ("train and validate dataloader initialized", "data loaded"),
    ("actor and ref model engine initialized", "actor ready"),
    ("checkpoint engine manager initialized", "vLLM ready"),
    ("all initialize finished", "first rollouts"),
)


# Ray's helper processes must start within 15 s, which no setting changes. On a busy machine they may not, so the launch
# is tried again.
RAY_TOO_SLOW = "The current node timed out during startup"
ATTEMPTS = 3


class TrainingError(RuntimeError):
    """Raised if the trainer ends with an error or is stopped; the message is one line with the log's path."""


@dataclass
class Launch:
    """A training run as a child process.

    Attributes:
        overrides: overrides of verl's configuration, as on its command line.
        folder: folder for `train.log` and `metrics.jsonl`.
        time_limit: seconds after which the run is ended.
        environment: environment variables, added to those of this process.
        module: Python module to run.
        process: the child; None before it is started.
        peak_bytes: largest measured memory of all its processes, with shared pages counted once.
        seconds: run time so far.
        memory: measurements: the run time, and for each process (name and id) the bytes that it does not share.
    """

    overrides: Sequence[str]
    folder: Path
    time_limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = "verl.trainer.main_ppo"
    peak_bytes: int = 0
    seconds: float = 0.0
    process: psutil.Popen | None = None
    memory: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def command(self) -> list[str]:
        """The command that is run."""
        return [sys.executable, "-m", self.module, *self.overrides]

    def largest(self, number: int = 6) -> list[tuple[str, int]]:
        """The processes with the largest peak of unshared memory: name and bytes, the largest first."""
        most: dict[str, int] = {}
        for _, own in self.memory:
            for name, size in own.items():
                most[name] = max(size, most.get(name, 0))
        return sorted(most.items(), key=lambda item: -item[1])[:number]

    def run(self) -> Iterator[tuple[str, Any]]:
        """Start the trainer and yield `("phase", text)` and `("step", record)` until it ends.

        A record is a line of verl's file logger: `{"step": int, "data": {name: value}}`.

        Raises:
            TrainingError: if the trainer fails or the time limit is reached; all its processes have then ended.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics.unlink(missing_ok=True)
        for attempts_left in reversed(range(ATTEMPTS)):
            # Ray, vLLM and verl leave sockets, locks and logs in the temporary folder, so they get their own one.
            with tempfile.TemporaryDirectory(prefix="hapo-", ignore_cleanup_errors=True) as scratch:
                try:
                    yield from self._run(scratch)
                    return
                except TrainingError:
                    if not attempts_left or RAY_TOO_SLOW not in self.log.read_text(errors="replace"):
                        raise

    def _run(self, scratch: str) -> Iterator[tuple[str, Any]]:
        started = time.monotonic()
        given = {"VERL_FILE_LOGGER_PATH": str(self.metrics), "TMPDIR": scratch}
        with self.log.open("w") as log:
            child = self.process = psutil.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **given, **self.environment},
                start_new_session=True,
            )
        family = _Family(child)
        records, phases = _Lines(self.metrics), _Lines(self.log)
        pending, next_look = list(PHASES), 0.0
        try:
            while True:
                code = child.poll()
                for line in phases.new():
                    for mark, text in [(mark, text) for mark, text in pending if mark in line]:
                        pending.remove((mark, text))
                        yield "phase", text
                for line in records.new():
                    yield "step", json.loads(line)
                self.seconds = time.monotonic() - started
                if code is not None:
                    break
                if self.seconds > self.time_limit:
                    raise TrainingError(f"stopped after {self.time_limit:.0f} s without an end; the log is {self.log}")
                if self.seconds >= next_look:
                    looked = time.monotonic()
                    shared_bytes, own = family.look()
                    # Measuring twenty processes takes a while on two cores, so it gets at most a twentieth of the time.
                    next_look = self.seconds + max(5, 20 * (time.monotonic() - looked))
                    self.peak_bytes = max(self.peak_bytes, shared_bytes)
                    self.memory.append((self.seconds, own))
                time.sleep(0.5)
            if code != 0:
                raise TrainingError(f"the trainer ended with exit code {code}; the log is {self.log}")
        finally:
            family.end()


class _Family:
    """A process and all processes that it has started, even if it has ended."""

    def __init__(self, child: psutil.Process) -> None:
        self._child = child
        self._members: dict[int, psutil.Process] = {child.pid: child}
        self._segments: set[Path] = set()

    def look(self) -> tuple[int, dict[str, int]]:
        """Total bytes, with shared pages divided among their users, and the unshared bytes of each process."""
        self._members |= {process.pid: process for process in _descendants(self._child)}
        total, own = 0, {}
        for process in self._members.values():
            try:
                name, info = name_of(process), process.memory_full_info()
                if name.startswith("VLLM"):
                    maps = (Path(part.path) for part in process.memory_maps(grouped=False))
                    self._segments |= {path for path in maps if path.match("/dev/shm/psm_*")}
            except psutil.Error:
                continue
            total += getattr(info, "pss", None) or info.rss
            own[f"{name} {process.pid}"] = info.uss
        return total, own

    def end(self) -> None:
        """End these processes and no others; psutil compares start times, so a reused process id is left alone.

        Also removes the shared memory of vLLM's engine, which stays behind when Ray kills the engine.
        """
        members = list(self._members.values())
        everyone = [*members, *(grandchild for process in members for grandchild in _descendants(process))]
        alive = [process for process in dict.fromkeys(everyone) if process.is_running()]
        for stop in ("terminate", "kill"):
            for process in alive:
                try:
                    getattr(process, stop)()
                except psutil.NoSuchProcess:
                    continue
            _, alive = psutil.wait_procs(alive, timeout=10)
        for segment in self._segments:
            segment.unlink(missing_ok=True)


class _Lines:
    """Reads the complete lines that were added to a growing file since the last call."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def new(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._position += len(complete) + len(newline)
        return complete.decode(errors="replace").splitlines()


def name_of(process: psutil.Process) -> str:
    """A name for a process: its title, such as `ray::WorkerDict`, or its program and for Python the script.

    Empty if the process has ended.
    """
    try:
        title, *arguments = process.cmdline()
    except (psutil.Error, ValueError):
        return ""
    if "::" in title:
        return title.partition(".")[0]
    script = next((Path(argument).name for argument in arguments if argument.endswith(".py")), "")
    return f"{Path(title).name} {script}".rstrip()


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def cpu_environment() -> dict[str, str]:
    """Environment variables for verl, vLLM's CPU build and torch on a machine without a GPU."""
    return {
        "VERL_PLATFORM": "cpu",
        "TORCH_COMPILE_DISABLE": "1",
        # vLLM's own setting for a fast first generation: 6 s instead of 17.
        "VLLM_CPU_CI_ENV": "1",
        # By default vLLM pins its threads to all cores but one; with two cores that is one thread on core 0.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Nothing is downloaded, and nothing waits for a network.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # There are more processes than cores; with more threads per process all of them get slower.
        "OMP_NUM_THREADS": "1",
        # Large tensors on huge pages: the kernel spends half the time on an update's page faults.
        "THP_MEM_ALLOC_ENABLE": "1",
        # Ray starts its workers with niceness 15, so that everything else on a laptop would run first.
        "RAY_worker_niceness": "0",
        # By default Ray gives up after 30 s, which is too short on a busy laptop.
        "RAY_raylet_start_wait_time_s": "90",
        # Ray's server keeps data about the last 100,000 tasks for the dashboard, which is not used here.
        "RAY_task_events_report_interval_ms": "0",
    }
