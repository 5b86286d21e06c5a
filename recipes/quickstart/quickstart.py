"""Runs verl's real trainer on a laptop: a real language model learns word problems on which GRPO stays at zero.

    make quickstart                      SmolLM2-135M-Instruct, HAPO as we recommend it: +hapo=plus
    make quickstart PRESET=paper         as in the paper
    make quickstart PRESET=grpo          verl's own grpo, everything else equal
    make quickstart-gsm8k GSM8K=<jsonl>  the same model on real word problems, a few steps
    make quickstart-digits               a random tiny model learns to write digits backwards

It prints its progress, and at the end some held-out problems answered before and after training, and a table of the
curves. Everything is written to one folder: `train.log`, `metrics.jsonl`, `curves.png`, `answers.txt`, `result.json`
and the page `report.html`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from hapo_verl.data.parquet import DataError, read_parquet  # noqa: E402
from hapo_verl.report.__main__ import report as report_page  # noqa: E402
from hapo_verl.report.__main__ import write  # noqa: E402
from launch import GIB, Launch, TrainingError, cpu_environment  # noqa: E402
from tasks import TASKS, Prepared  # noqa: E402

# What each preset adds to the common configuration.
HAPO = ["trainer.v1.trainer_mode=hapo_sync", "hapo.poll_interval=0.05"]
PRESETS = {
    "plus": ["+hapo=plus", *HAPO],
    "paper": ["+hapo=paper", *HAPO],
    "grpo": [
        "algorithm.adv_estimator=grpo",
        f"trainer.v1.sampler.custom_sampler.path={HERE / 'eager_replay_buffer.py'}",
        "trainer.v1.sampler.custom_sampler.name=EagerReplayBuffer",
    ],
}
# The baselines. grpo above is verl's own; hapo_grpo is the same algorithm in HAPO's trainer, which leaves out rows
# without a gradient.
BASELINES = ("dapo", "luffy", "srft", "chord", "s_grpo", "real", "real_ssi")
PRESETS |= {name: [f"+hapo={name}", *HAPO] for name in BASELINES}
PRESETS["hapo_grpo"] = ["+hapo=grpo", *HAPO]

TRACE = ["hapo.trace_limit=16"]

# Curves: label → name of the metric in verl's logger; {} is the data source. verl's own `critic/score` is the
# on-policy success only if nothing is injected.
CURVES = {
    "held-out success": "val-core/{}/acc/mean@1",
    "on-policy success": "hapo/on_policy_success",
    "teacher share of rows": "hapo/injected/row_share",
    "gate firing rate": "hapo/gate/firing_rate",
}
ON_POLICY_WITHOUT_HAPO = "critic/score/mean"
LR = "actor_rollout_ref.actor.optim.lr"
# As verl names the parts of a step whose seconds it logs.
PARTS = ("step", "gen", "old_log_prob", "update_actor", "update_weights", "testing")


def overrides(
    preset: str, folder: Path, task: Prepared, *, steps: int, seed: int, lr: float | None = None
) -> list[str]:
    """The overrides of one run: common configuration, task, run and preset."""
    run = {
        "data.seed": seed,
        "actor_rollout_ref.rollout.seed": seed,
        "actor_rollout_ref.actor.data_loader_seed": seed,
        "trainer.total_training_steps": steps,
        "trainer.experiment_name": preset,
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.validation_data_dir": folder / "validation",
    }
    if lr is not None:
        run["actor_rollout_ref.actor.optim.lr"] = f"{lr:g}"
    settings = yaml.safe_load((HERE / "config.yaml").read_text()) | task.settings | run
    hapo: list[str] = []
    if preset != "grpo":  # that is verl's own: it has no groups to trace for the report
        hapo = [*(f"{key}={value}" for key, value in task.hapo.items()), f"hapo.trace_dir={folder / 'trace'}", *TRACE]
    return ["+hapo_platform=cpu", *(f"{key}={value}" for key, value in settings.items()), *PRESETS[preset], *hapo]


def answers(folder: Path, number: int = 3) -> list[tuple[str, str, str, str]]:
    """Held-out problems as (question, right answer, answer before training, answer after training).

    Args:
        folder: folder of the run, with verl's dumps of its validations and the held-out problems.
        number: number of problems.
    """
    files = sorted((folder / "validation").glob("*.jsonl"), key=lambda path: int(path.stem))
    if len(files) < 2:
        return []
    before, after = (
        {_question(row["input"]): row for row in map(json.loads, path.read_text().splitlines())}
        for path in (files[0], files[-1])
    )
    asked = [row["prompt"][0]["content"] for row in read_parquet(folder / "data" / "heldout.parquet")]
    shown = [question for question in asked if question in before and question in after][:number]
    return [(q, str(after[q]["gts"]), before[q]["output"], after[q]["output"]) for q in shown]


def _question(prompt: str) -> str:
    """A prompt without the roles of the chat template."""
    return prompt.removeprefix("user\n").removesuffix("assistant\n").strip()


def transcript(found: Sequence[tuple[str, str, str, str]]) -> str:
    """The answers as text."""
    parts = []
    for question, right, before, after in found:
        parts.append(f"{question}  [{right}]\n" + _indented("before", before) + _indented("after", after))
    return "\n".join(parts)


def _indented(label: str, text: str) -> str:
    first, *others = text.strip().splitlines() or [""]
    return "".join(f"  {name:8}{line}\n" for name, line in [(label, first), *(("", line) for line in others)])


def curves(
    records: Sequence[Mapping[str, Any]], data_source: str, more: Mapping[str, str] | None = None
) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each curve; curves that a preset does not have are absent.

    Args:
        records: records of verl's file logger.
        data_source: data source of the main held-out problems.
        more: label → data source of further held-out problems.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    held_out = {label: CURVES["held-out success"].format(source) for label, source in (more or {}).items()}
    for label, template in (CURVES | held_out).items():
        names = [template.format(data_source)]
        if label == "on-policy success":
            names.append(ON_POLICY_WITHOUT_HAPO)
        for record in records:
            found = next((record["data"][name] for name in names if name in record["data"]), None)
            if found is not None:
                points.setdefault(label, []).append((record["step"], float(found)))
    return points


def parts(metrics: Path) -> dict[str, float]:
    """The mean seconds of a step and of its longest parts, over the steps of a run.

    Args:
        metrics: the file of verl's file logger.
    """
    records = [record["data"] for record in map(json.loads, metrics.read_text().splitlines()) if record["step"] > 0]
    found = {name: [record[f"timing_s/{name}"] for record in records if f"timing_s/{name}" in record] for name in PARTS}
    return {name: round(statistics.fmean(seconds), 2) for name, seconds in found.items() if seconds}


def table(points: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """A table with the first and the last value of each curve."""
    lines = [f"{'':24}{'first':>8}{'last':>8}"]
    lines += [f"{label:24}{values[0][1]:8.3f}{values[-1][1]:8.3f}" for label, values in points.items()]
    return "\n".join(lines)


def draw(points: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """Draw the curves into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, values in points.items():
        axes.plot(*zip(*values, strict=True), label=label, linewidth=2 if label == "held-out success" else 1)
    axes.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
    axes.legend(loc="center left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def machine() -> str:
    """A description of this machine in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0]} x {len(names)}" if names else cpu
    return f"{cpu}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """The commit of this checkout, with `+` if files differ from it."""
    run = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    answer = subprocess.run(run, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


class Progress:
    """Shows progress: on a terminal one line that is rewritten, otherwise a line every ten steps."""

    def __init__(self, steps: int) -> None:
        self._steps, self._started, self._live = steps, time.monotonic(), sys.stdout.isatty()
        self._first_step: tuple[int, float] | None = None

    def phase(self, text: str) -> None:
        self._write(f"{self._elapsed()}  starting: {text}", keep=True)

    def step(self, step: int, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        now = time.monotonic()
        self._first_step = self._first_step or (step, now)
        done, since = step - self._first_step[0], now - self._first_step[1]
        left = f", {(self._steps - step) * since / done:.0f} s left" if done else ""
        values = "  ".join(f"{label} {values[-1][1]:.2f}" for label, values in points.items())
        self._write(f"{self._elapsed()}  step {step}/{self._steps}{left}  {values}", keep=step % 10 == 0)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"[{seconds // 60}:{seconds % 60:02}]"

    def _write(self, text: str, *, keep: bool) -> None:
        if self._live:
            print(f"\r\033[K{text}", end="\n" if keep else "", flush=True)
        elif keep:
            print(text, flush=True)


def train(launch: Launch, *, steps: int, task: Prepared) -> dict[str, list[tuple[int, float]]]:
    """Run the trainer to its end, show progress, and return the curves of the run."""
    progress, records = Progress(steps), []
    for kind, value in launch.run():
        if kind == "phase":
            progress.phase(value)
        else:
            records.append(value)
            progress.step(value["step"], curves(records, task.data_source))
    return curves(records, task.data_source, task.more)


def report(launch: Launch, points: dict[str, list[tuple[int, float]]], title: str, settings: Mapping[str, Any]) -> None:
    """Print answers and table, and write picture, `result.json` and the report page to the folder."""
    draw(points, title, launch.folder / "curves.png")
    result = {
        **settings,
        "curves": points,
        "seconds": round(launch.seconds),
        "seconds_of_a_step": parts(launch.metrics),
        "peak_memory_gib": round(launch.peak_bytes / GIB, 2),
        "largest_processes_gib": {name: round(number / GIB, 2) for name, number in launch.largest()},
        "machine": machine(),
        "commit": commit(),
    }
    found = answers(launch.folder)
    if found:
        result["answers"] = found
        (launch.folder / "answers.txt").write_text(transcript(found))
        print(f"\nheld-out problems, before and after\n\n{transcript(found)}")
    (launch.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{title}\n\n{table(points)}\n")
    print(f"{launch.seconds:.0f} s, peak memory {launch.peak_bytes / GIB:.1f} GiB, commit {commit()}, {machine()}")
    print(f"picture {launch.folder / 'curves.png'}\nmetrics {launch.metrics}\nlog     {launch.log}")
    page = launch.folder / "report.html"
    write(report_page([launch.folder]), page)
    print(f"report  {page}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 if the trainer reached its last step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="plus")
    parser.add_argument("--task", choices=TASKS, default="words")
    parser.add_argument("--digits", type=int, default=4)
    parser.add_argument("--gsm8k", type=Path, help="GSM8K as JSON lines with question and answer")
    parser.add_argument("--steps", type=int, help="default: what the task needs with this preset")
    parser.add_argument("--heldout", type=int, help="held-out problems, of each kind; default: 50 words, 100 digits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, help="learning rate; default: the task's")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds for the trainer")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further overrides of the trainer's keys")
    args = parser.parse_args(argv)

    folder = (args.output / f"{args.task}-{args.preset}-seed{args.seed}").resolve()
    task = TASKS[args.task]
    steps = args.steps or task.steps.get(args.preset, task.steps[""])
    try:
        prepared = task.prepare(folder, steps, args.seed, args)
    except (DataError, ModuleNotFoundError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    title = f"{prepared.title}, {args.preset}, seed {args.seed}"
    # A trace is appended to its files, so that of an earlier run must go.
    shutil.rmtree(folder / "trace", ignore_errors=True)
    launch = Launch(
        overrides=[
            *overrides(args.preset, folder, prepared, steps=steps, seed=args.seed, lr=args.lr),
            *args.overrides,
        ],
        folder=folder,
        time_limit=args.time_limit,
        environment=cpu_environment() | prepared.environment,
    )
    print(f"{title}; {steps} steps of verl's trainer, its log is {launch.log}", flush=True)
    try:
        points = train(launch, steps=steps, task=prepared)
    except TrainingError as error:
        tail = launch.log.read_text(errors="replace").splitlines()[-15:]
        print("\n".join(tail), file=sys.stderr)
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nquickstart: stopped; the log is {launch.log}", file=sys.stderr)
        return 130
    target = "quickstart" if args.task == "words" else f"quickstart-{args.task}"
    lr = prepared.settings.get(LR) or yaml.safe_load((HERE / "config.yaml").read_text())[LR]
    settings = {
        "task": args.task,
        "preset": args.preset,
        "seed": args.seed,
        "steps": steps,
        "lr": args.lr or lr,
        "command": f"make {target} PRESET={args.preset} SEED={args.seed} STEPS={steps}"
        + (f" LR={args.lr:g}" if args.lr else "")
        + (f' OVERRIDES="{" ".join(args.overrides)}"' if args.overrides else ""),
    }
    report(launch, points, title, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
