"""Does memory grow in a long run? Measures each process over 1,000 steps of verl's trainer, and what is left behind.

    python bench/soak.py                  ten to twenty minutes on two cores
    python bench/soak.py --steps 4        a quick check that it runs

A tiny model, 4 prompts x 4 rollouts per step, the gate that remembers prompts, and a checkpoint every 250 steps. Memory
is the unshared memory of a process (USS). The first fifth of the run does not count; of each later tenth the median is
taken. A process is flat if no median differs from the first one by more than 5 %, or 2 MiB for a small process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from bisect import bisect
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "quickstart"))
import digits
import quickstart
import tasks
import tiny_model
from harness import machine
from launch import Launch, cpu_environment

QUICKSTART = Path(quickstart.__file__).parent
MIB = 2**20
FLAT, FLAT_MIB = 0.05, 2
SETTINGS = [
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "hapo.gate.name=posterior",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.max_actor_ckpt_to_keep=1",
]


def prepared(folder: Path, steps: int) -> Launch:
    """Write the model and the data of the run into a folder, and return its launch."""
    tiny_model.write(folder / "model", alphabet="0123456789", hidden=64, layers=2, seed=1)
    digits.write(folder / "data", digits=3, train=512, heldout=16, seed=1)
    settings = {"data.max_response_length": 4}
    settings |= tasks.files(folder, folder / "model", QUICKSTART / "digits.py", "heldout")
    task = tasks.Prepared("soak", digits.DATA_SOURCE, {}, settings, {}, {})
    overrides = quickstart.overrides("plus", folder, task, steps=steps, seed=1)
    saving = f"trainer.save_freq={max(steps // 4, 1)}"
    return Launch(
        overrides=[*overrides, *SETTINGS, saving], folder=folder, time_limit=4 * 3600, environment=cpu_environment()
    )


def windows(
    samples: Sequence[tuple[float, dict[str, int]]], times: Sequence[float], steps: int
) -> dict[str, list[float | None]]:
    """The median of each process's unshared MiB in each tenth of the run, without the first two tenths.

    Args:
        samples: pairs of seconds, and bytes by process.
        times: seconds at which step 1, 2, ... had ended.
        steps: number of steps of the run.
    """
    tenths: dict[str, list[list[int]]] = {}
    for seconds, own in samples:
        tenth = bisect(times, seconds) * 10 // steps
        for name, held in own.items():
            tenths.setdefault(name, [[] for _ in range(10)])
            if tenth < 10:
                tenths[name][tenth].append(held)
    return {
        name: [statistics.median(held) / MIB if held else None for held in of[2:]]
        for name, of in tenths.items()
        if any(of[2:])
    }


def drift(medians: Sequence[float | None]) -> float:
    """The largest relative deviation from the first median."""
    held = [value for value in medians if value is not None]
    return max(abs(value - held[0]) for value in held) / held[0]


def is_flat(medians: Sequence[float | None]) -> bool:
    """Whether no median differs from the first one by more than 5 % or 2 MiB."""
    first = next(value for value in medians if value is not None)
    return drift(medians) * first <= max(FLAT * first, FLAT_MIB)


def listing() -> set[Path]:
    """List the files of shared memory and of the temporary folder."""
    return {path for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).glob("*")}


def unused(paths: Iterable[Path]) -> list[str]:
    """The files that no process uses, as mapped memory or temporary folder, since other runs may be using some."""
    used = ""
    for process in psutil.process_iter():
        try:
            used += process.environ().get("TMPDIR", "") + Path(f"/proc/{process.pid}/maps").read_text()
        except (psutil.Error, OSError):
            continue
    return sorted(str(path) for path in paths if str(path) not in used)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 if every process is flat and nothing is left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)

    before = listing()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        launch, times = prepared(Path(folder), args.steps), []
        for kind, record in launch.run():
            if kind == "step":
                times.append(launch.seconds)
                if record["step"] % 50 == 0:
                    print(f"step {record['step']}, {launch.seconds:.0f} s", flush=True)
        mark = f"VERL_FILE_LOGGER_PATH={launch.metrics}"
        processes = [process.pid for process in psutil.process_iter() if mark in environment(process)]
    files = unused(listing() - before)

    medians = windows(launch.memory, times, args.steps)
    rows = sorted(medians.items(), key=lambda item: -drift(item[1]))
    lines = ["| process | MiB of its own, by tenth of the run | drift |", "|---|---|---|"]
    for name, held in rows:
        shown = " ".join("–" if value is None else f"{value:.0f}" for value in held)
        lines.append(f"| {name.rpartition(' ')[0]} | {shown} | {drift(held):.1%} |")
    table = "\n".join(lines)
    left = f"left behind: {len(processes)} processes, {len(files)} files {' '.join(files)}".rstrip()
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "command": f"python bench/soak.py --steps {args.steps}",
        "steps": len(times),
        "seconds": round(launch.seconds),
        "medians_mib": medians,
        "drift": {name: round(drift(held), 4) for name, held in rows},
        "processes_left": processes,
        "files_left": files,
    }
    (args.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{table}\n\n{len(times)} steps in {launch.seconds:.0f} s; {left}")
    return int(not all(is_flat(held) for _, held in rows) or bool(processes or files) or len(times) < args.steps)


def environment(process: psutil.Process) -> list[str]:
    """The environment of a process, as `name=value`; empty if it may not be read."""
    try:
        return [f"{name}={value}" for name, value in process.environ().items()]
    except psutil.Error:
        return []


if __name__ == "__main__":
    sys.exit(main())
