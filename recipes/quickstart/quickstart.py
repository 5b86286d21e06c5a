"""verl's real trainer on a laptop: a task on which GRPO stays at zero, learned with HAPO.

    make quickstart                      HAPO as we recommend it: +hapo=plus
    make quickstart PRESET=paper         as in the paper
    make quickstart PRESET=grpo          verl's own grpo, everything else equal
    make quickstart-gsm8k GSM8K=<jsonl>  the same trainer on real word problems, a few steps

Prints where it stands, ends with a table and a picture of the curves, and leaves everything in one folder:
`train.log`, `metrics.jsonl`, `curves.png`, `result.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import digits as digits_task  # noqa: E402
import tiny_model  # noqa: E402
from launch import GIB, Launch, TrainingError, cpu_environment  # noqa: E402

# What each preset adds to the same configuration.
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
# The baselines; grpo above is verl's own.
PRESETS |= {name: [f"+hapo={name}", *HAPO] for name in ("dapo", "luffy", "srft", "real", "real_ssi")}

# Enough for each to learn the digits, with room; luffy and grpo get as many as paper, the others as many as plus.
STEPS = dict.fromkeys(PRESETS, 120) | {"paper": 180, "luffy": 180, "grpo": 180}

# Curves: label and the metric's name in verl's logger; {} is the data source. verl's own `critic/score` is the
# on-policy success only where nothing is injected.
CURVES = {
    "held-out success": "val-core/{}/acc/mean@1",
    "on-policy success": "hapo/on_policy_success",
    "teacher share of rows": "hapo/injected/row_share",
    "gate firing rate": "hapo/gate/firing_rate",
}
ON_POLICY_WITHOUT_HAPO = "critic/score/mean"


def overrides(
    preset: str,
    folder: Path,
    *,
    steps: int,
    seed: int,
    response_length: int,
    reward: Path | None,
    lr: float | None = None,
) -> list[str]:
    """The command line of one run: the shared configuration, the task's paths, the preset."""
    shared = [f"{key}={value}" for key, value in yaml.safe_load((HERE / "config.yaml").read_text()).items()]
    task = [
        f"data.train_files={folder / 'data' / 'train.parquet'}",
        f"data.val_files={folder / 'data' / 'heldout.parquet'}",
        # The answer and its end of sequence: a longer limit only slows the learning down.
        f"data.max_response_length={response_length}",
        f"data.seed={seed}",
        f"actor_rollout_ref.model.path={folder / 'model'}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"actor_rollout_ref.actor.data_loader_seed={seed}",
        f"trainer.total_training_steps={steps}",
        f"trainer.experiment_name={preset}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
    ]
    if lr is not None:
        task.append(f"actor_rollout_ref.actor.optim.lr={lr:g}")
    if reward is not None:
        task += [f"reward.custom_reward_function.path={reward}", "reward.custom_reward_function.name=compute_score"]
    return ["+hapo_platform=cpu", *shared, *task, *PRESETS[preset]]


def curves(records: Sequence[Mapping[str, Any]], data_source: str) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each curve; curves that a preset does not have are absent."""
    points: dict[str, list[tuple[int, float]]] = {}
    for label, template in CURVES.items():
        names = [template.format(data_source)]
        if label == "on-policy success":
            names.append(ON_POLICY_WITHOUT_HAPO)
        for record in records:
            found = next((record["data"][name] for name in names if name in record["data"]), None)
            if found is not None:
                points.setdefault(label, []).append((record["step"], float(found)))
    return points


def table(points: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """First and last value of each curve."""
    lines = [f"{'':24}{'first':>8}{'last':>8}"]
    lines += [f"{label:24}{values[0][1]:8.3f}{values[-1][1]:8.3f}" for label, values in points.items()]
    return "\n".join(lines)


def draw(points: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """The curves as a PNG file."""
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
    """This machine in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0]} x {len(names)}" if names else cpu
    return f"{cpu}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """The commit of this checkout, with `+` where files differ from it."""
    run = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    answer = subprocess.run(run, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


class Progress:
    """One line that is rewritten on a terminal, a line every ten steps elsewhere."""

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


def train(launch: Launch, *, steps: int, data_source: str) -> dict[str, list[tuple[int, float]]]:
    """Run the trainer to its end, showing progress; the curves of the run."""
    progress, records = Progress(steps), []
    for kind, value in launch.run():
        if kind == "phase":
            progress.phase(value)
        else:
            records.append(value)
            progress.step(value["step"], curves(records, data_source))
    return curves(records, data_source)


def report(launch: Launch, points: dict[str, list[tuple[int, float]]], title: str, settings: Mapping[str, Any]) -> None:
    """Table to the terminal, picture and `result.json` to the folder."""
    draw(points, title, launch.folder / "curves.png")
    result = {
        **settings,
        "curves": points,
        "seconds": round(launch.seconds),
        "peak_memory_gib": round(launch.peak_bytes / GIB, 2),
        "machine": machine(),
        "commit": commit(),
    }
    (launch.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{title}\n\n{table(points)}\n")
    print(f"{launch.seconds:.0f} s, peak memory {launch.peak_bytes / GIB:.1f} GiB, commit {commit()}, {machine()}")
    print(f"picture {launch.folder / 'curves.png'}\nmetrics {launch.metrics}\nlog     {launch.log}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when the trainer reached its last step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="plus")
    parser.add_argument("--task", choices=("digits", "gsm8k"), default="digits")
    parser.add_argument("--digits", type=int, default=4)
    parser.add_argument("--gsm8k", type=Path, help="GSM8K as JSON lines with question and answer")
    parser.add_argument("--steps", type=int, help="default: 3 (gsm8k), else 120, or 180 (paper, luffy, grpo)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, help="learning rate; default: that of config.yaml")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--time-limit", type=float, default=1800, help="seconds for the trainer")
    args = parser.parse_args(argv)

    folder = (args.output / f"{args.task}-{args.preset}-seed{args.seed}").resolve()
    if args.task == "digits":
        steps, data_source, reward = args.steps or STEPS[args.preset], digits_task.DATA_SOURCE, HERE / "digits.py"
        response_length, extra = args.digits + 1, []
        digits_task.write(folder / "data", digits=args.digits, train=16 * steps, heldout=100, seed=args.seed)
        tiny_model.write(folder / "model", alphabet="0123456789", hidden=128, layers=2, seed=args.seed)
        title = f"reverse {args.digits} digits, {args.preset}, seed {args.seed}"
    else:
        import gsm8k
        from hapo_verl.data.gsm8k import GSM8K
        from hapo_verl.data.parquet import DataError

        steps, data_source, reward = args.steps or 3, GSM8K, None
        try:
            response_length, extra = gsm8k.write(folder / "data", args.gsm8k)
        except DataError as error:
            print(f"quickstart: {error}", file=sys.stderr)
            return 2
        tiny_model.write(folder / "model", alphabet=None, hidden=128, layers=2, seed=args.seed)
        title = f"GSM8K, {args.preset}, seed {args.seed}, {steps} steps of a random tiny model"

    launch = Launch(
        overrides=overrides(
            args.preset, folder, steps=steps, seed=args.seed, response_length=response_length, reward=reward, lr=args.lr
        )
        + extra,
        folder=folder,
        time_limit=args.time_limit,
        environment=cpu_environment(),
    )
    print(f"{title}; {steps} steps of verl's trainer, its log is {launch.log}", flush=True)
    try:
        points = train(launch, steps=steps, data_source=data_source)
    except TrainingError as error:
        tail = launch.log.read_text(errors="replace").splitlines()[-15:]
        print("\n".join(tail), file=sys.stderr)
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nquickstart: stopped; the log is {launch.log}", file=sys.stderr)
        return 130
    target = "quickstart" if args.task == "digits" else "quickstart-gsm8k"
    settings = {
        "task": args.task,
        "preset": args.preset,
        "seed": args.seed,
        "steps": steps,
        "lr": args.lr or yaml.safe_load((HERE / "config.yaml").read_text())["actor_rollout_ref.actor.optim.lr"],
        "command": f"make {target} PRESET={args.preset} SEED={args.seed} STEPS={steps}"
        + (f" LR={args.lr:g}" if args.lr else ""),
    }
    report(launch, points, title, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
