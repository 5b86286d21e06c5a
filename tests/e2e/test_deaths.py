"""If a part of a run is killed, the run loses only the steps after its last checkpoint.

One training run with a checkpoint every second step, in four launches: an agent loop worker is killed, then vLLM's
engine, then the driver; the last launch reaches the end. The gate remembers prompts, of which there are two batches:
from step 3 on each was seen before.
"""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import psutil
import pytest

from hapo_verl.config import HapoConfig
from hapo_verl.driver.gatekeeper import STATE_FILE, Gatekeeper
from tests.e2e.conftest import PROMPTS, ROLLOUTS, TrainingError, name_of
from tests.e2e.test_limits import SCRIPTED

# One fixture runs four launches.
pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(3600)]
STEPS, SAVED_EVERY, MINUTE = 16, 2, 60
GATE = {"gate": {"name": "posterior", "threshold": 0.3}, "budget": {"share": 0.75}}
SETTINGS = [
    "+hapo=paper",
    "trainer.v1.trainer_mode=hapo_sync",
    "hapo.injection.mode=append",
    "hapo.gate.name=posterior",
    "hapo.gate.threshold=0.3",
    "hapo.budget.share=0.75",
    "hapo.poll_interval=0.05",
    "hapo.trace_dir={folder}/trace",
    *SCRIPTED,
    f"trainer.save_freq={SAVED_EVERY}",
    "trainer.resume_mode=auto",
]


DRIVER = "the process that was started"
# Agents of a Ray node, which wait for their raylet for a little more than a minute.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Death:
    """A launch in which a process is killed after the second step, and the result."""

    def __init__(self, prepare, checkpoints, *, name, victim):
        overrides = [*SETTINGS, f"trainer.default_local_dir={checkpoints}"]
        launch, self.run = prepare(name, *overrides, steps=STEPS, rows=2 * PROMPTS, whole=False)
        self.checkpoints, self.error, self.seconds, self.left_behind = checkpoints, None, 0.0, []
        steps, at = 0, 0.0
        try:
            for kind, _ in launch.run():
                steps += kind == "step"
                if steps == 2 and victim and not at:
                    family = [launch.process, *launch.process.children(recursive=True)]
                    (process,) = family[:1] if victim == DRIVER else [p for p in family if name_of(p) == victim]
                    at = time.monotonic()
                    process.kill()
                    if victim == DRIVER:
                        _, alive = psutil.wait_procs(family, timeout=MINUTE)
                        self.left_behind = [name for name in map(name_of, alive) if name not in AGENTS]
                        _, alive = psutil.wait_procs(alive, timeout=MINUTE)
                        self.left_behind += map(name_of, alive)
        except TrainingError as error:
            self.error, self.seconds = error, time.monotonic() - at
        self.log = launch.log.read_text(errors="replace")
        self.steps = sorted({group["step"] for group in self.run.groups})


@pytest.fixture(scope="module")
def deaths(prepared, tmp_path_factory):
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    return [
        Death(prepared, checkpoints, name="worker_killed", victim="ray::HapoAgentLoopWorker"),
        Death(prepared, checkpoints, name="engine_killed", victim="VLLM::EngineCore"),
        Death(prepared, checkpoints, name="driver_killed", victim=DRIVER),
        Death(prepared, checkpoints, name="finished", victim=None),
    ]


@pytest.mark.parametrize(("number", "what"), [(0, "agent loop worker 0"), (1, "vllm engine 0")])
def test_the_run_stops_within_a_minute_with_a_line_that_says_what_died(deaths, number, what):
    death = deaths[number]
    assert death.error is not None
    assert death.seconds < MINUTE
    (line,) = [line for line in death.log.splitlines() if "hapo: " in line and " died (" in line]
    assert f"hapo: {what} died (" in line
    assert line.endswith("Start it again with trainer.resume_mode=auto: it goes on from its last checkpoint.")


def test_a_killed_driver_leaves_no_process_behind(deaths):
    assert deaths[2].left_behind == []


def trained(deaths):
    """The groups of every step, from the launch whose work the next one went on from."""
    return {
        step: [group for group in death.run.groups if group["step"] == step] for death in deaths for step in death.steps
    }


def test_every_launch_continues_after_the_last_checkpoint(deaths):
    assert deaths[-1].error is None
    assert deaths[0].steps[0] == 1
    assert deaths[-1].steps[-1] == STEPS
    for before, after in pairwise(deaths):
        saved = after.steps[0] - 1
        assert saved % SAVED_EVERY == 0
        assert before.steps[-1] - SAVED_EVERY <= saved <= before.steps[-1]


def test_every_step_is_trained_and_no_demonstration_is_lost_or_counted_twice(deaths):
    groups = trained(deaths)
    assert sorted(groups) == list(range(1, STEPS + 1))
    prompts = [{group["index"] for group in groups[step]} for step in sorted(groups)]
    for first, second in zip(prompts[::2], prompts[1::2], strict=True):
        assert len(first) == len(second) == PROMPTS
        assert len(first | second) == 2 * PROMPTS
    last = deaths[-1].run
    rows = Counter(row["uid"] for row in last.loss_rows if row["hapo_demonstration"] and any(row["response_mask"]))
    assert rows == Counter(group["uid"] for group in last.groups if group["outcome"] == "injected")
    assert rows


def test_the_gate_decides_as_in_a_run_without_a_death(deaths):
    """Each step's decisions follow from the outcomes of the steps before it."""
    hapo = HapoConfig.parse(GATE)
    keeper = Gatekeeper(hapo, total_steps=STEPS)
    rows = deaths[0].run.train.to_dict("records")
    row_of = {row["extra_info"]["index"]: row for row in rows}
    keeper.know(rows, prompt_column="prompt")
    groups = trained(deaths)
    for step in range(1, STEPS + 1):
        for group in groups[step]:
            row = row_of[group["index"]]
            columns = {name: [row[name]] for name in ("data_source", "extra_info", "prompt")}
            (given,) = keeper.situations(columns | {"raw_prompt": [row["prompt"]]}, step, prompt_column="prompt")
            a, b = given["prior_success"], given["prior_failure"]
            assert group["confidence"] == (a + sum(group["scores"])) / (a + b + ROLLOUTS)
        assert sum(group["outcome"] == "injected" for group in groups[step]) <= 0.75 * PROMPTS
        keeper.observe(groups[step])
    with np.load(deaths[-1].checkpoints / f"global_step_{STEPS}" / STATE_FILE) as saved:
        state = dict(saved)
    for name, value in keeper.state.posterior.arrays().items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
