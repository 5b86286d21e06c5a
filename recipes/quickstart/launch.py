"""Run `python -m verl.trainer.main_ppo` as a child: output to a log file, metrics as they come, an end for sure.

verl prints its configuration twice and thousands of lines; a worker that dies during a weight sync leaves the trainer
waiting for ever. So the child writes to a log, verl's `file` logger is read for progress, and a time limit ends the
child with everything that it started.
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

# Lines of verl's log that say how far the start-up has come.
PHASES = (
    ("Started a local Ray instance", "Ray is up"),
    ("train and validate dataloader initialized", "data loaded"),
    ("actor and ref model engine initialized", "actor ready"),
    ("checkpoint engine manager initialized", "vLLM ready"),
    ("all initialize finished", "first rollouts"),
)


# Ray gives its helpers 15 s to start, which no setting changes, and a busy machine may not: then once more.
RAY_TOO_SLOW = "The current node timed out during startup"
ATTEMPTS = 3


class TrainingError(RuntimeError):
    """The trainer ended with an error or was stopped; the message is one line with the log's path."""


@dataclass
class Launch:
    """A training run as a child process.

    Attributes:
        overrides: of verl's configuration, as on its command line.
        folder: receives `train.log` and `metrics.jsonl`.
        time_limit: seconds after which the run is ended.
        environment: added to this process's.
        process: the child, once it was started.
        peak_bytes: the most that its processes held at a look, pages they share counted once.
        seconds: that it took so far.
        memory: at each look the seconds and of each process, by name and id, the bytes that are its own.
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
        """What is executed."""
        return [sys.executable, "-m", self.module, *self.overrides]

    def largest(self, number: int = 6) -> list[tuple[str, int]]:
        """Name and bytes of its own of the largest processes, each when it was largest."""
        most: dict[str, int] = {}
        for _, own in self.memory:
            for name, size in own.items():
                most[name] = max(size, most.get(name, 0))
        return sorted(most.items(), key=lambda item: -item[1])[:number]

    def run(self) -> Iterator[tuple[str, Any]]:
        """Start the trainer and yield `("phase", text)` and `("step", record)` until it has ended.

        A record is a line of verl's file logger: `{"step": int, "data": {name: value}}`.

        Raises:
            TrainingError: on an error of the trainer or at the time limit; nothing of the run is left behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics.unlink(missing_ok=True)
        for attempts_left in reversed(range(ATTEMPTS)):
            # Ray, vLLM and verl leave sockets, locks and logs in the temporary folder: theirs goes with them.
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
                    # Looking at a family of twenty processes takes a while on two cores: a twentieth of the time.
                    next_look = self.seconds + max(5, 20 * (time.monotonic() - looked))
                    self.peak_bytes = max(self.peak_bytes, shared_bytes)
                    self.memory.append((self.seconds, own))
                time.sleep(0.5)
            if code != 0:
                raise TrainingError(f"the trainer ended with exit code {code}; the log is {self.log}")
        finally:
            family.end()


class _Family:
    """A process and all that it has started, whether it still lives or not."""

    def __init__(self, child: psutil.Process) -> None:
        self._child = child
        self._members: dict[int, psutil.Process] = {child.pid: child}
        self._segments: set[Path] = set()

    def look(self) -> tuple[int, dict[str, int]]:
        """Bytes of all (shared pages divided among their users), and of each, by name and id, the bytes of its own."""
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

        vLLM's engine, which Ray ends without asking, would leave its shared memory behind.
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
    """The complete lines that a growing file has gained since the last look."""

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
    """What it calls itself, as `ray::WorkerDict` without the method it is in, or its program and, of Python, the file.

    Empty where it is gone.
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
    """What verl, vLLM's CPU build and torch need to hear on a machine without a GPU."""
    return {
        "VERL_PLATFORM": "cpu",
        "TORCH_COMPILE_DISABLE": "1",
        # vLLM's own switch for a quick first generation: 6 s instead of 17.
        "VLLM_CPU_CI_ENV": "1",
        # On its own vLLM pins its computation to all cores but one: of a laptop's two that is one thread on core 0.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Nothing is downloaded, and nobody waits for a network.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # The trainer's processes outnumber a laptop's cores; more threads each make all of them slower.
        "OMP_NUM_THREADS": "1",
        # Ray gives its workers niceness 15: on a laptop everything else would come first.
        "RAY_worker_niceness": "0",
        # Ray gives up after 30 s by default, which a busy laptop needs.
        "RAY_raylet_start_wait_time_s": "90",
        # Ray's server keeps what it knows of the last 100,000 tasks, for a dashboard that is not there.
        "RAY_task_events_report_interval_ms": "0",
    }
