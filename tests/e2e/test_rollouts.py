"""Rollouts allocated by the prompts' posteriors, in verl's unmodified trainer, which is killed and resumed.

The model has learned half of the answers, and sixteen prompts recur every second step. The expected number of rollouts
of each prompt is computed from the outcomes of the earlier steps, as if there had been one launch.
"""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from hapo_verl.config import HapoConfig
from hapo_verl.driver.gatekeeper import Gatekeeper, row_name
from hapo_verl.driver.rollouts import Rollouts
from tests.e2e.conftest import PROMPTS, ROLLOUTS

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1800)]
KILLED_AFTER, STEPS = 3, 6
BLOCK = {"gate": {"name": "posterior"}, "rollouts": {"allocate": "posterior"}}
SETTINGS = [
    "+hapo=paper",
    "trainer.v1.trainer_mode=hapo_sync",
    "hapo.gate.name=posterior",
    "hapo.rollouts.allocate=posterior",
    "hapo.poll_interval=0.05",
    "hapo.trace_dir={folder}/trace",
    "actor_rollout_ref.actor.optim.optimizer=SGD",
    "actor_rollout_ref.actor.optim.lr=0.01",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
    "trainer.save_freq=1",
]


@pytest.fixture(scope="module")
def launches(killed_and_resumed, able):
    return killed_and_resumed(
        *SETTINGS,
        f"actor_rollout_ref.model.path={able}",
        after=KILLED_AFTER,
        steps=STEPS,
        rows=2 * PROMPTS,
    )


def steps_of(launches):
    """Each step, its groups and its metrics, from the launch whose work counts."""
    for step, run in launches.steps():
        first = 1 if step <= launches.saved else launches.saved + 1
        yield step, [group for group in run.groups if group["step"] == step], run.steps[step - first]


def test_a_step_keeps_its_total_of_rollouts_and_its_prompts_get_different_numbers(launches):
    numbers = [[len(group["successes"]) for group in groups] for _, groups, _ in steps_of(launches)]
    assert len(numbers) == STEPS
    assert {(len(of_step), sum(of_step)) for of_step in numbers} == {(PROMPTS, PROMPTS * ROLLOUTS)}
    # In the first step nothing is known about any prompt.
    assert set(numbers[0]) == {ROLLOUTS}
    # A later step may by chance have only prompts with equal odds, but not every step.
    assert any(len(set(of_step)) > 1 for of_step in numbers[2:])
    assert all(2 <= n <= 2 * ROLLOUTS for of_step in numbers for n in of_step)


def test_each_prompt_gets_rollouts_by_its_earlier_outcomes_in_both_launches(launches):
    hapo = HapoConfig.parse(BLOCK)
    keeper, rollouts = Gatekeeper(hapo, total_steps=STEPS), Rollouts(hapo.rollouts, ROLLOUTS)
    rows = launches.killed.train.to_dict("records")
    keeper.know(rows, prompt_column="prompt")
    key_of = {row["extra_info"]["index"]: row_name(row, "prompt")[0] for row in rows}
    for step, groups, logged in steps_of(launches):
        assert [group["key"] for group in groups] == [key_of[group["index"]] for group in groups]
        of_index = {row["extra_info"]["index"]: row for row in rows}
        chosen = [of_index[group["index"]] for group in groups]
        columns = {name: [row[name] for row in chosen] for name in ("data_source", "extra_info", "prompt")}
        situations = keeper.situations(columns | {"raw_prompt": chosen}, step, prompt_column="prompt")
        expected = rollouts.allocate(situations)
        # Among prompts with the same prior the order of submission decides, and that is not traced.
        priors = [(s["prior_success"], s["prior_failure"]) for s in situations]
        got = [len(group["successes"]) for group in groups]
        assert Counter(zip(priors, got, strict=True)) == Counter(zip(priors, expected, strict=True))
        for name, value in rollouts.metrics(groups).items():
            assert logged[name] == pytest.approx(value), (step, name)
        keeper.observe(groups)


def test_every_row_reaches_the_loss_once_with_the_advantage_of_its_own_group(launches):
    for run in (launches.killed, launches.resumed):
        rows = [json.loads(line) for line in (run.folder / "trace" / "rows.jsonl").read_text().splitlines()]
        advantages = {}
        for row in run.loss_rows:
            advantages.setdefault(row["uid"], []).append(row["advantages"][0])
        for group in run.groups:
            if group["uid"] not in advantages:
                continue  # The driver was killed in this step.
            scores = torch.tensor([[row["score"]] for row in rows if row["uid"] == group["uid"]])
            assert len(scores) == len(group["successes"])
            verls, _ = compute_grpo_outcome_advantage(scores.clone(), torch.ones_like(scores), np.zeros(len(scores)))
            assert sorted(advantages[group["uid"]]) == pytest.approx(sorted(verls[:, 0].tolist()), abs=1e-6)


def test_validation_keeps_its_own_number_of_rollouts(launches):
    *_, (_, _, last) = steps_of(launches)
    assert any(name.startswith("val-core/") for name in last)
