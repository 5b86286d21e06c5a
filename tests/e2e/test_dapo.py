"""DAPO's preset with demonstrations as additional rows, in the asynchronous trainer."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from tests.e2e.conftest import PROMPTS, ROLLOUTS, expected_to_move, moved

pytestmark = [pytest.mark.e2e, pytest.mark.long]
TRACED = ["hapo.poll_interval=0.05", "hapo.trace_dir={folder}/trace", "hapo.injection.mode=append"]
STEPS = 3


SETTINGS = [
    "+hapo=dapo",
    "hapo.gate.name=paper",
    *TRACED,
    "trainer.v1.trainer_mode=hapo_colocate_async",
    "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=true",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=512",
    "actor_rollout_ref.model.use_remove_padding=true",
    "hapo.kernels.head=policy_head",
    "actor_rollout_ref.rollout.calculate_log_probs=true",
]


@pytest.fixture(scope="module")
def asynchronous(trainer):
    return trainer("append_async", *SETTINGS, unusable=True, steps=STEPS)


@pytest.fixture(scope="module")
def skipping(trainer):
    return trainer("append_async_without_idle_rows", *SETTINGS, unusable=True, steps=STEPS, whole=False)


def test_the_colocated_asynchronous_trainer_injects_and_filters(asynchronous):
    # A failed group without a demonstration has no signal and is filtered; one with a demonstration is kept.
    assert [group["outcome"] for group in asynchronous.groups] == ["injected"] * (STEPS * PROMPTS)
    assert sum(s.get("training/filter_groups/evicted_samples", 0) for s in asynchronous.steps) > 0
    assert all("training/off_policy/trajectory_staleness/mean" in s for s in asynchronous.steps)


def test_our_head_computes_the_log_probabilities_that_vllm_sampled_with(asynchronous):
    log = (asynchronous.folder / "train.log").read_text(errors="replace")
    assert "the head of Qwen2ForCausalLM is policy_head" in log
    # Later steps also train on rollouts of an earlier policy.
    stale = [logged["training/off_policy/trajectory_staleness/max"] for logged in asynchronous.steps]
    assert stale[0] == 0
    assert asynchronous.steps[0]["training/rollout_probs_diff_max"] < 1e-6
    assert all(np.isfinite(logged["actor/grad_norm"]) for logged in asynchronous.steps)


def test_every_rollout_stays_and_the_demonstration_is_an_additional_row(asynchronous):
    rows = defaultdict(list)
    for row in asynchronous.loss_rows:
        rows[row["uid"]].append(row)
    for group in asynchronous.groups:
        demonstrations = [row for row in rows[group["uid"]] if row["hapo_demonstration"]]
        own = [row for row in rows[group["uid"]] if not row["hapo_demonstration"]]
        assert (len(demonstrations), len(own)) == (1, ROLLOUTS)
        scores = torch.tensor([[score] for score in group["scores"]])
        verls, _ = compute_grpo_outcome_advantage(scores.clone(), torch.ones_like(scores), np.zeros(len(scores)))
        assert sorted(row["advantages"][0] for row in own) == pytest.approx(sorted(verls[:, 0].tolist()), abs=1e-6)
        everyone = torch.tensor([*group["scores"], 1.0])
        expected = (1 - scores.mean()) / (everyone.std() + 1e-6)
        assert demonstrations[0]["advantages"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_appended_rows_make_the_two_mini_batches_larger_and_add_no_third(asynchronous):
    # 8 x 9 rows are padded to two mini-batches of 40 rows; padding to verl's multiple of 32 would add a third.
    assert len(asynchronous.loss_rows) == STEPS * 80
    trained = Counter(row["uid"] for row in asynchronous.loss_rows if any(row["response_mask"]))
    assert set(trained.values()) == {ROLLOUTS + 1}


def test_rows_without_a_gradient_are_left_out_in_the_asynchronous_trainer(skipping):
    assert [group["outcome"] for group in skipping.groups] == ["injected"] * (STEPS * PROMPTS)
    assert sum(s.get("training/filter_groups/evicted_samples", 0) for s in skipping.steps) > 0
    assert moved(skipping) == expected_to_move(skipping.groups)
    assert max(logged["hapo/trained/row_share"] for logged in skipping.steps) < 1
