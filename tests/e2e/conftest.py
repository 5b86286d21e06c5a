"""Fixtures that start verl's unmodified trainer with Ray and vLLM on this machine's CPU, on the quickstart's task."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas
import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import digits  # noqa: E402
import tiny_model  # noqa: E402
from launch import Launch, TrainingError, cpu_environment, name_of  # noqa: E402

__all__ = ["DIGITS", "PROMPTS", "QUICKSTART", "ROLLOUTS", "ROOT", "UNUSABLE", "Run", "TrainingError", "name_of"]

DIGITS, PROMPTS, ROLLOUTS = 3, 8, 8

WHOLE = "hapo.skip_idle_rows=false", "hapo.old_log_probs=all"
TRACE_ALL = "hapo.trace_groups=null", "hapo.trace_limit=null"

# Unusable demonstrations by the row's index modulo 8; demonstrations of other rows are usable.
UNUSABLE = {0: (None, "missing"), 1: ("1234567", "overlong"), 2: ("12", "rejected"), 3: (" ", "empty")}


@dataclass
class Run:
    """A finished run of the trainer."""

    folder: Path
    train: pandas.DataFrame

    @cached_property
    def steps(self) -> list[dict]:
        """Metrics of each training step."""
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [record["data"] for record in records if record["step"] > 0]

    @cached_property
    def groups(self) -> list[dict]:
        """`hapo_group` of every group that was trained on."""
        return _lines(self.folder / "trace" / "groups.jsonl")

    @cached_property
    def loss_rows(self) -> list[dict]:
        """Rows as they reached the loss."""
        return [row for path in sorted((self.folder / "trace").glob("loss-*.jsonl")) for row in _lines(path)]

    @cached_property
    def dumped(self) -> list[dict]:
        """verl's own dump of the trained rows, `trainer.rollout_data_dir`."""
        return [row for path in sorted((self.folder / "rollouts").glob("*.jsonl")) for row in _lines(path)]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_to_move(groups: list[dict]) -> dict[str, Counter]:
    """The numbers of own rows (False) and demonstrations (True) with a gradient, for groups with any.

    Own rows are compared with each other only, as `on_policy` does.
    """
    found = {}
    for group in groups:
        own = sum(score != fmean(group["scores"]) for score in group["scores"])
        found[group["uid"]] = Counter({False: own, True: int(group["outcome"] == "injected")})
    return {uid: counts for uid, counts in found.items() if counts.total()}


def moved(run: Run) -> dict[str, Counter]:
    """The same numbers, counted from the rows that reached the loss with an advantage."""
    found: dict[str, Counter] = {}
    for row in run.loss_rows:
        if any(row["advantages"]):
            found.setdefault(row["uid"], Counter())[bool(row["hapo_demonstration"])] += 1
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.write(folder, alphabet="0123456789", hidden=64, layers=2, seed=0)
    return folder


@pytest.fixture(scope="session")
def able(model, tmp_path_factory) -> Path:
    """The model after it has learned half of the answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.recipes.plain import plain_loop

    folder = tmp_path_factory.mktemp("able") / "model"
    shutil.copytree(model, folder)
    policy_model = AutoModelForCausalLM.from_pretrained(model)
    settings = plain_loop.Settings(digits=DIGITS, warm=0.5)
    task = plain_loop.make_task(settings)
    plain_loop.warm_up(plain_loop.Policy(policy_model, AutoTokenizer.from_pretrained(model), task), settings)
    policy_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, model):
    """A run that is ready to start: `prepared("name", *overrides, unusable=...)` gives its launch and its folder.

    `rows` is the number of training rows; `demonstration` makes a row's demonstration from its answer and index;
    `environment` is added to the run's. HAPO's trainer trains on every row, so that tests see all rows, unless `whole`
    is False.
    """

    def prepare(
        name: str,
        *overrides: str,
        steps: int = 3,
        unusable: bool = False,
        rows: int = PROMPTS * 16,
        demonstration: Callable[[str, int], Any] | None = None,
        environment: dict[str, str] | None = None,
        whole: bool = True,
    ) -> tuple[Launch, Run]:
        folder = tmp_path_factory.mktemp(name)
        digits.write(folder / "data", digits=DIGITS, train=rows, heldout=16, seed=0)
        train = pandas.read_parquet(folder / "data" / "train.parquet")
        if unusable:
            indices = [info["index"] for info in train["extra_info"]]
            train["demonstration"] = [
                UNUSABLE[index % 8][0] if index % 8 in UNUSABLE else text
                for index, text in zip(indices, train["demonstration"], strict=True)
            ]
            train.to_parquet(folder / "data" / "train.parquet")
        if demonstration is not None:
            indices = [info["index"] for info in train["extra_info"]]
            train["demonstration"] = list(map(demonstration, train["demonstration"], indices))
            train.to_parquet(folder / "data" / "train.parquet")
        settings = yaml.safe_load((QUICKSTART / "config.yaml").read_text()) | {
            "data.train_files": folder / "data" / "train.parquet",
            "data.val_files": folder / "data" / "heldout.parquet",
            "data.train_batch_size": PROMPTS,
            "data.max_response_length": DIGITS + 1,
            "actor_rollout_ref.model.path": model,
            "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
            "actor_rollout_ref.actor.use_dynamic_bsz": "false",
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": "false",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 16,
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 16,
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 16,
            "actor_rollout_ref.rollout.agent.agent_loop_config_path": ROOT / "tests/e2e/agent_loops.yaml",
            "reward.custom_reward_function.path": QUICKSTART / "digits.py",
            "reward.custom_reward_function.name": "compute_score",
            "trainer.total_training_steps": steps,
            "trainer.val_before_train": "false",
            "trainer.test_freq": steps,
            "trainer.default_local_dir": folder / "checkpoints",
            "trainer.rollout_data_dir": folder / "rollouts",
        }
        is_hapo = any(item.startswith("+hapo=") for item in overrides)
        launch = Launch(
            overrides=[
                "+hapo_platform=cpu",
                *(f"{key}={value}" for key, value in settings.items()),
                *(TRACE_ALL if is_hapo else ()),
                *overrides,
                *(WHOLE if whole and is_hapo else ()),
            ],
            folder=folder,
            time_limit=900,
            environment=cpu_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | (environment or {}),
        )
        launch.overrides = [item.replace("{folder}", str(folder)) for item in launch.overrides]
        return launch, Run(folder, train)

    return prepare


def finish(name: str, launch: Launch) -> None:
    """Run a launch to its end; a trainer that ends with an error fails the test with the end of its log."""
    try:
        for _ in launch.run():
            pass
    except TrainingError as error:
        tail = "\n".join(launch.log.read_text(errors="replace").splitlines()[-40:])
        pytest.fail(f"{name}: {error}\n{tail}", pytrace=False)


@pytest.fixture(scope="session")
def trainer(prepared):
    """Runs the trainer to its end: `trainer("name", *overrides)` with the arguments of `prepared`."""

    def run(name: str, *overrides: str, **settings) -> Run:
        launch, prepared_run = prepared(name, *overrides, **settings)
        finish(name, launch)
        return prepared_run

    return run


class KilledAndResumed(NamedTuple):
    """A launch that was killed, and one with the same settings that went on from its last checkpoint."""

    killed: Run
    resumed: Run
    saved: int  # The last step of the first launch that has a checkpoint.
    checkpoints: Path

    def steps(self) -> Iterator[tuple[int, Run]]:
        """Each step from 1, with the launch whose work counts."""
        for step in range(1, self.saved + len(self.resumed.steps) + 1):
            yield step, self.killed if step <= self.saved else self.resumed


@pytest.fixture(scope="session")
def killed_and_resumed(prepared, tmp_path_factory):
    """Runs a launch, kills its processes after step `after`, and runs it again to its end.

    `change` is called with each run before it starts, `between` with the last checkpoint before the second launch.
    """

    def run(
        *overrides: str,
        after: int,
        change: Callable[[Run], None] = lambda run: None,
        between: Callable[[Path], None] = lambda checkpoint: None,
        **settings: Any,
    ) -> KilledAndResumed:
        checkpoints = tmp_path_factory.mktemp("checkpoints")
        overrides = (*overrides, "trainer.resume_mode=auto", f"trainer.default_local_dir={checkpoints}")
        launch, killed = prepared("killed", *overrides, **settings)
        change(killed)
        try:
            steps = 0
            for kind, _ in launch.run():
                steps += kind == "step"
                if steps == after:
                    family = [launch.process, *launch.process.children(recursive=True)]
                    launch.process.kill()
                    psutil.wait_procs(family, timeout=60)
            pytest.fail(f"the launch ended before it was killed after step {after}")
        except TrainingError:
            pass
        saved = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
        between(checkpoints / f"global_step_{saved}")
        launch, resumed = prepared("resumed", *overrides, **settings)
        change(resumed)
        finish("resumed", launch)
        return KilledAndResumed(killed, resumed, saved, checkpoints)

    return run
