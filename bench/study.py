"""Which gate, and replace or append? A grid of gates, modes and seeds on tasks that a tiny model learns in a minute.

    python bench/study.py                                   the whole grid, one line a run; goes on where it stopped
    python bench/study.py --task digits4 --seeds 2          a part of it
    python bench/study.py --report                          table and picture of the runs that there are

Every run is the plain loop (`recipes/plain_loop/plain_loop.py`): the functions of `hapo_verl.algo`, without verl. Cells
of one task differ in gate, mode and normalisation only: same model, questions, learning rate and steps at each seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "plain_loop"))
from plain_loop import Settings, train

from harness import machine

TASKS = {
    "digits3": Settings(digits=3, hidden=64, steps=120),
    "digits4": Settings(digits=4, hidden=128, steps=180),
    # The demonstrations take a detour of a dot, for which half of the questions leave no room.
    "detour3": Settings(digits=3, detour=1, hidden=128, steps=200),
}
GATES = ("paper", "zero", "annealed", "adaptive", "posterior", "thompson", "always")
# All of them on the shortest task, with and without the deviation; on the others those that decide.
EVERY = [(gate, mode) for gate in GATES for mode in ("replace", "append")] + [("never", "replace")]
DECIDING = [cell for cell in EVERY if cell[1] == "append" and cell[0] != "thompson"]
DECIDING += [("paper", "replace"), ("never", "replace")]


def grid(tasks: Iterable[str], seeds: int) -> list[tuple[str, Settings]]:
    """Every run of the study."""
    runs = []
    for seed in range(seeds):
        for task in tasks:
            for scale_by_std in (True, False) if task == "digits3" else (True,):
                for gate, mode in EVERY if task == "digits3" else DECIDING:
                    settings = replace(TASKS[task], gate=gate, mode=mode, scale_by_std=scale_by_std, seed=seed)
                    runs.append((task, settings))
    return runs


def name_of(task: str, settings: Settings) -> str:
    """Of a run, and of its file."""
    normalised = "std" if settings.scale_by_std else "nostd"
    return f"{task}-{settings.gate}-{settings.mode}-{normalised}-seed{settings.seed}"


def run(job: tuple[str, str, Settings]) -> str:
    """Train one cell at one seed and write its file, whole or not at all."""
    torch.set_num_threads(1)
    folder, task, settings = job
    started = time.perf_counter()
    history = train(settings)
    record = {
        "task": task,
        "settings": vars(settings),
        "history": {
            key: [(record["step"], round(record[key], 5)) for record in history if key in record]
            for key in history[-1]
            if key != "step"
        },
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(),
    }
    path = Path(folder) / f"{name_of(task, settings)}.json"
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(record) + "\n")
    unfinished.replace(path)
    return f"{path.stem}: held-out {record['history']['heldout_success'][-1][1]:.2f}, {record['seconds']} s"


# Label and how to take it from a run's history.
def _first_reaching(points: Sequence[tuple[int, float]], level: float) -> float:
    return next((step for step, value in points if value >= level), float("nan"))


def _late(points: Sequence[tuple[int, float]], share: float = 0.2) -> float:
    """Mean over the last fifth; where the policy's own rows gave no gradient there is nothing to compare with."""
    finite = [value for _, value in points[-max(1, int(len(points) * share)) :] if value != float("inf")]
    return statistics.fmean(finite) if finite else float("nan")


MEASURES = {
    "held-out, last": lambda h: h["heldout_success"][-1][1],
    "area under held-out": lambda h: statistics.fmean(value for _, value in h["heldout_success"]),
    "steps to .5": lambda h: _first_reaching(h["heldout_success"], 0.5),
    "steps to .9": lambda h: _first_reaching(h["heldout_success"], 0.9),
    "teacher share": lambda h: statistics.fmean(value for _, value in h["teacher_share"]),
    "teacher share, late": lambda h: _late(h["teacher_share"]),
    "gradient deviation, late": lambda h: _late(h["gradient_deviation"]),
}


def cells(folder: Path) -> dict[tuple[str, bool, str], list[dict[str, Any]]]:
    """Runs of each cell (task, normalisation, gate/mode), seeds in order."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        settings = record["settings"]
        found[record["task"], settings["scale_by_std"], f"{settings['gate']}/{settings['mode']}"].append(record)
    return dict(found)


def summary(values: Sequence[float]) -> str:
    """Mean and deviation over seeds; how many seeds where some never got there."""
    there = [value for value in values if value == value]
    if not there:
        return "–"
    mean = statistics.fmean(there)
    text = f"{mean:.0f}" if mean >= 10 else f"{mean:.3f}"
    if len(there) > 1:
        spread = statistics.stdev(there)
        text += f" ± {spread:.0f}" if mean >= 10 else f" ± {spread:.3f}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def tables(found: dict[tuple[str, bool, str], list[dict[str, Any]]]) -> str:
    """One Markdown table a task and normalisation, cells ordered by the area under their held-out curve."""
    parts = []
    for task, scaled in sorted({(task, scaled) for task, scaled, _ in found}, key=lambda key: (key[0], not key[1])):
        rows = {cell: runs for (t, s, cell), runs in found.items() if (t, s) == (task, scaled)}
        area = MEASURES["area under held-out"]
        order = sorted(rows, key=lambda cell: -statistics.fmean(area(run["history"]) for run in rows[cell]))
        seeds = {len(runs) for runs in rows.values()}
        parts.append(
            f"### {task}, {'std' if scaled else 'no std'}: {TASKS[task].steps} steps, "
            f"{'/'.join(map(str, sorted(seeds)))} seeds\n\n"
            f"| gate/mode | {' | '.join(MEASURES)} |\n|---|{'---|' * len(MEASURES)}"
        )
        for cell in order:
            values = [summary([measure(run["history"]) for run in rows[cell]]) for measure in MEASURES.values()]
            parts[-1] += f"\n| {cell} | {' | '.join(values)} |"
    return "\n\n".join(parts) + "\n"


def draw(found: dict[tuple[str, bool, str], list[dict[str, Any]]], path: Path) -> None:
    """Held-out success of the cells with deviation: mean over seeds and its 95 % band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TASKS if any(t == task and scaled for t, scaled, _ in found)]
    figure, grid_of_axes = pyplot.subplots(
        2, len(tasks), figsize=(5 * len(tasks), 7), layout="constrained", sharey=True, squeeze=False
    )
    for column, task in enumerate(tasks):
        for row, mode in enumerate(("replace", "append")):
            axes = grid_of_axes[row][column]
            for number, gate in enumerate((*GATES, "never")):
                runs = found.get((task, True, f"{gate}/{mode}")) or found.get((task, True, f"{gate}/replace"))
                if not runs or (gate != "never" and (task, True, f"{gate}/{mode}") not in found):
                    continue
                curves = [[value for _, value in run["history"]["heldout_success"]] for run in runs]
                steps = [step for step, _ in runs[0]["history"]["heldout_success"]]
                mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                band = [
                    1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                    for values in zip(*curves, strict=True)
                ]
                axes.plot(steps, mean, label=gate, color=f"C{number}")
                low, high = zip(*[(m - b, m + b) for m, b in zip(mean, band, strict=True)], strict=True)
                axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
            axes.set(title=f"{task}, {mode}", xlabel="step", ylim=(-0.02, 1.02))
    grid_of_axes[0][0].legend(fontsize="small")
    grid_of_axes[0][0].set_ylabel("held-out success")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(out: Path) -> None:
    """`study.md`, `study.png` and `study.json` (every curve) from the runs under `out/runs`."""
    found = cells(out / "runs")
    runs = [run for group in found.values() for run in group]
    commits = sorted({run["machine"]["commit"] for run in runs})
    head = (
        f"{len(runs)} runs of the plain loop, commit {', '.join(commits)}, {runs[0]['machine']['device']}; "
        "mean ± deviation over seeds. `python bench/study.py` makes them again.\n\n"
    )
    (out / "study.md").write_text(head + tables(found))
    (out / "study.json").write_text("\n".join(json.dumps(run) for run in runs) + "\n")
    draw(found, out / "study.png")
    print(head + tables(found))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "study")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--smoke", action="store_true", help="two short runs, no claim")
    args = parser.parse_args(argv)

    jobs = grid(args.task, args.seeds)
    if args.smoke:
        jobs = [(task, replace(settings, steps=2, prompts=2, test_every=2)) for task, settings in jobs[:2]]
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not (args.out / "runs" / f"{name_of(*job)}.json").exists()]
    if not args.report:
        print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are done", flush=True)
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            todo = [(str(args.out / "runs"), *job) for job in missing]
            for number, line in enumerate(pool.imap_unordered(run, todo), start=1):
                print(f"{number}/{len(todo)}  {line}", flush=True)
    report(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
