"""Rollout and training on separate devices: a vLLM server only generates, and gets weights over gloo."""

import pytest

from tests.e2e.conftest import PROMPTS, ROLLOUTS, expected_to_move, moved

pytestmark = [pytest.mark.e2e, pytest.mark.long]
STEPS, UPDATES = 4, 2


@pytest.fixture(scope="module")
def run(trainer):
    return trainer(
        "separate_async",
        "+hapo=plus",
        "trainer.v1.trainer_mode=hapo_separate_async",
        f"trainer.v1.separate_async.parameter_sync_step={UPDATES}",
        "hapo.poll_interval=0.05",
        "hapo.trace_dir={folder}/trace",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // UPDATES}",
        "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
        "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=tests.e2e.gloo_checkpoint_engine",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "algorithm.rollout_correction.rollout_is=token",
        # One device slot trains and one generates.
        "ray_kwargs.ray_init.num_gpus=2",
        steps=STEPS,
        whole=False,
    )


def test_the_updates_train_on_every_row_with_a_gradient_including_demonstrations(run):
    assert len(run.groups) == STEPS * PROMPTS
    assert {group["outcome"] for group in run.groups} <= {"injected", "not_fired"}
    assert moved(run) == expected_to_move(run.groups)
    assert min(logged["hapo/trained/row_share"] for logged in run.steps) < 1


def test_a_gate_uses_the_threshold_of_the_step_in_which_its_prompt_was_submitted(run):
    # Steps are weight updates here, and there are STEPS of them.
    schedule = {0.8 * (1 - step / STEPS): step + 1 for step in range(STEPS)}
    late = []
    for group in run.groups:
        (submitted,) = (step for value, step in schedule.items() if group["threshold"] == pytest.approx(value))
        assert submitted <= group["step"]
        late.append(group["step"] - submitted)
        fires = (1 + sum(group["successes"])) / (2 + ROLLOUTS) < group["threshold"]
        assert group["fired"] == fires
        assert group["successes"] == [score == 1.0 for score in group["scores"]]
    # While one batch trains, the next one is already being generated.
    assert 0 < max(late) <= 2


def test_staleness_is_logged_and_the_first_rollouts_are_the_policys_own(run):
    staleness = [logged["training/off_policy/trajectory_staleness/mean"] for logged in run.steps]
    assert staleness[0] == 0
    assert max(staleness) > 0
    # The weights were transferred: vLLM's log-probabilities agree with the actor's.
    assert run.steps[0]["training/rollout_probs_diff_max"] < 1e-4
