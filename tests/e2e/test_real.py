"""REAL with demonstrations in verl's own trainer: what defines it, on the rows that reached the loss."""

from collections import Counter

import pytest

from tests.e2e.conftest import PROMPTS, ROLLOUTS
from tests.e2e.test_limits import HAPO, SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.long]
TRACED = [*SCRIPTED, "trainer.save_freq=-1", *HAPO]
STEPS, EPOCHS, MINI_BATCHES = 2, 2, 2
ROWS = PROMPTS * ROLLOUTS // MINI_BATCHES


@pytest.fixture(scope="module")
def real_ssi(trainer):
    return trainer(
        "real_ssi",
        "+hapo=real_ssi",
        *TRACED,
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // MINI_BATCHES}",
        f"actor_rollout_ref.actor.ppo_epochs={EPOCHS}",
        steps=STEPS,
    )


def updates(run, rows_of_update):
    """The traced rows of each optimizer step."""
    rows = run.loss_rows
    return [rows[start : start + rows_of_update] for start in range(0, len(rows), rows_of_update)]


def test_real_sees_whole_groups_in_every_optimizer_step(real_ssi):
    steps = updates(real_ssi, ROWS)
    assert len(steps) == STEPS * EPOCHS * MINI_BATCHES
    for rows in steps:
        assert set(Counter(row["uid"] for row in rows).values()) == {ROLLOUTS}
        assert all(value == 0 for row in rows for value in row["advantages"])


def test_reals_first_weights_of_a_step_follow_from_the_counts_of_the_group(real_ssi):
    group_of = {group["uid"]: group for group in real_ssi.groups}
    per_step = EPOCHS * MINI_BATCHES
    for rows in updates(real_ssi, ROWS)[::per_step]:
        for uid in {row["uid"] for row in rows}:
            group = group_of[uid]
            successes = sum(group["successes"]) + (group["outcome"] == "injected")
            mine = sorted(row["hapo_likelihood_weight"] for row in rows if row["uid"] == uid)
            # At s = 0 each row has 1/τ/(1 + n), times the rows divided by the groups of the optimizer step.
            scale = ROWS / (PROMPTS // MINI_BATCHES) / 0.5
            up, down = scale / (1 + successes), -scale / (1 + ROLLOUTS - successes)
            expected = [down] * (ROLLOUTS - successes) + [up] * successes if successes < ROLLOUTS else [0.0] * ROLLOUTS
            assert mine == pytest.approx(expected, rel=1e-4)
        demonstrations = [row for row in rows if row["hapo_demonstration"]]
        assert demonstrations
        assert all(row["hapo_likelihood_weight"] > 0 for row in demonstrations)


def test_later_weights_of_a_step_depend_on_the_changed_policy(real_ssi):
    # The first two epochs of step 1.
    first, second, *_ = updates(real_ssi, MINI_BATCHES * ROWS)
    weight = {(row["uid"], tuple(row["responses"])): row["hapo_likelihood_weight"] for row in first}
    moved = [row["hapo_likelihood_weight"] - weight[row["uid"], tuple(row["responses"])] for row in second]
    assert max(map(abs, moved)) > 1e-4
    # The weights of demonstrations that became more likely are smaller in sum, although a single one may be larger.
    demonstrations = [row for row in second if row["hapo_demonstration"]]
    before = sum(weight[row["uid"], tuple(row["responses"])] for row in demonstrations)
    assert sum(row["hapo_likelihood_weight"] for row in demonstrations) < before
    assert 0 < real_ssi.steps[0]["hapo/loss/real"] < 5
