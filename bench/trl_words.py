"""Does TRL's trainer show the same as verl's? The quickstart's word problems in TRL's trainer, with and without HAPO.

    python bench/trl_words.py --trainer hapo --steps 32     recipes/trl/words.py, tested every sixth step
    python bench/trl_words.py --trainer grpo --steps 6      TRL's own GRPOTrainer, the same settings

    python bench/trl_words.py --table                       write results/trl/README.md from the results there

Runs in the environment with TRL. It writes results/trl/NAME-STEPSsteps-seedS.json after every test; when started
again, it continues from its last checkpoint (--checkpoints).
"""

from __future__ import annotations

import argparse
import json
import runpy
import time
from pathlib import Path
from typing import Any

import trl
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hapo_verl.trl import HapoGRPOConfig, HapoGRPOTrainer
from harness import REPOSITORY, machine, version

WORDS = runpy.run_path(str(REPOSITORY / "recipes" / "trl" / "words.py"))
NOTED = ("hapo/on_policy_success", "hapo/injected/group_share", "hapo/demonstration/probability", "reward", "step_time")


class Record(TrainerCallback):
    """A callback that records held-out success every few steps, and the trainer's own metrics of each step."""

    def __init__(self, path: Path, every: int, about: dict[str, Any]) -> None:
        self._path, self._every, self._started = path, every, time.monotonic()
        self.trainer: Any = None
        self.problems: list[Any] = []
        before = json.loads(path.read_text()) if path.exists() else {}
        self._record = about | {name: before.get(name, {}) for name in ("held_out", "steps")}
        self._seconds = before.get("seconds", 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._test(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.global_step and logs and "reward" in logs:
            self._record["steps"][str(state.global_step)] = {key: logs[key] for key in NOTED if key in logs}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._test(state)

    def _test(self, state: Any) -> None:
        model = self.trainer.model
        success = WORDS["success"](model, self.trainer.processing_class, self.problems)
        model.train()
        self._record["held_out"][str(state.global_step)] = success
        self._record["seconds"] = self._seconds + time.monotonic() - self._started
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._record, indent=1) + "\n")
        print(f"step {state.global_step}: held-out success {success:.2f}", flush=True)


def table(folder: Path) -> str:
    """A table with a row for each run: held-out and on-policy success, time, machine, commit and command."""
    lines = [
        "# Word problems in TRL's trainer",
        "",
        "Made by `python bench/trl_words.py --table`. 50 held-out problems of the trained templates;",
        "greedy. A step is 8 prompts x 8 completions. Two threads, beside other work on the machine.",
        "",
        "| trainer | seed | held-out success, by step | minutes | commit | command |",
        "|---|---|---|---|---|---|",
    ]
    machines: dict[str, None] = {}
    for path in sorted(folder.glob("*-seed*.json"), reverse=True):
        run = json.loads(path.read_text())
        curve = ", ".join(f"{step}: {success:.2f}" for step, success in run["held_out"].items())
        about = run["machine"]
        cells = [
            run["trainer"],
            run["seed"],
            curve,
            round(run["seconds"] / 60),
            about["commit"],
            f"`{about['command']}`",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        software = ", ".join(f"{name} {about[name]}" for name in ("torch", "trl", "transformers"))
        machines[f"{about['device']}, Python {about['python']}, {software}."] = None
    return "\n".join([*lines, "", *machines]) + "\n"


def main() -> None:
    """Train, or continue a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trainer", choices=("hapo", "grpo"))
    what.add_argument("--table", action="store_true")
    parser.add_argument("--steps", type=int, default=32, help="of the schedule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=6, help="steps between two tests")
    parser.add_argument("--checkpoints", type=Path, default=REPOSITORY / "outputs" / "trl")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results" / "trl")
    given = parser.parse_args()
    if given.table:
        (given.out / "README.md").write_text(table(given.out))
        return
    name = f"{given.trainer}-{given.steps}steps-seed{given.seed}"
    folder = given.checkpoints / name
    settings = WORDS["SETTINGS"] | {
        "output_dir": str(folder), "max_steps": given.steps, "seed": given.seed, "disable_tqdm": True,
        "save_strategy": "steps", "save_steps": given.every, "save_total_limit": 1,
    }  # fmt: skip
    if given.trainer == "grpo":
        settings.pop("hapo")
    config, trainer_class = (
        (HapoGRPOConfig, HapoGRPOTrainer) if given.trainer == "hapo" else (trl.GRPOConfig, trl.GRPOTrainer)
    )
    about = {
        "trainer": given.trainer,
        "seed": given.seed,
        "machine": machine() | {name: version(name) for name in ("trl", "transformers")},
        "settings": {key: value for key, value in settings.items() if key != "output_dir"},
    }
    record = Record(given.out / f"{name}.json", given.every, about)
    trainer, _, record.problems = WORDS["setup"](trainer_class, config(**settings))
    record.trainer = trainer
    trainer.add_callback(record)
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)


if __name__ == "__main__":
    main()
