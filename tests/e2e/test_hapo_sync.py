"""What verl's trainer really trained on: gate, demonstrations, advantages and loss, with everything switched on.

KL to a reference model, rollout correction with weights and rejection, two mini-batches and two epochs a step, dynamic
batch size, sessions that fail, demonstrations that cannot be used.
"""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from tests.e2e.conftest import PROMPTS, ROLLOUTS, UNUSABLE

pytestmark = pytest.mark.e2e
STEPS, EPOCHS = 3, 2


@pytest.fixture(scope="module")
def run(trainer):
    return trainer(
        "hapo_sync",
        "+hapo=paper",
        "trainer.v1.trainer_mode=hapo_sync",
        "hapo.poll_interval=0.05",
        "hapo.trace_dir={folder}/trace",
        "actor_rollout_ref.rollout.agent.default_agent_loop=failing",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.entropy_coeff=0.001",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=seq_mean_k1",
        "algorithm.rollout_correction.rollout_rs_threshold=0.5_2.0",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        f"actor_rollout_ref.actor.ppo_epochs={EPOCHS}",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=512",
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=512",
        steps=STEPS,
        unusable=True,
    )


def by_uid(rows, key):
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def test_every_prompt_was_trained_on_although_sessions_failed(run):
    assert len(run.groups) == STEPS * PROMPTS
    sizes = Counter(len(group["scores"]) for group in run.groups)
    assert max(sizes) == ROLLOUTS
    assert min(sizes) < ROLLOUTS, "no session failed, so nothing was tested"


def test_the_outcome_of_every_group_follows_from_its_scores_and_its_demonstration(run):
    for group in run.groups:
        rollouts, successes = len(group["scores"]), sum(score == 1.0 for score in group["scores"])
        assert group["successes"] == [score == 1.0 for score in group["scores"]]
        if (1 + successes) * 5 < 4 * (2 + rollouts) and successes < rollouts:
            _, reason = UNUSABLE.get(group["index"] % 8, (None, "injected"))
            assert group["outcome"] == reason
        else:
            assert group["outcome"] == "not_fired"


def test_logged_counts_equal_a_recomputation_from_the_groups(run):
    for step, logged in enumerate(run.steps, start=1):
        groups = [group for group in run.groups if group["step"] == step]
        outcomes = Counter(group["outcome"] for group in groups)
        for _, reason in UNUSABLE.values():
            assert logged[f"hapo/refused/{reason}"] == pytest.approx(outcomes[reason] / PROMPTS)
        assert logged["hapo/injected/group_share"] == pytest.approx(outcomes["injected"] / PROMPTS)
        assert logged["hapo/gate/firing_rate"] == pytest.approx(1 - outcomes["not_fired"] / PROMPTS)
        rows = sum(len(group["scores"]) for group in groups)
        assert logged["hapo/injected/row_share"] == pytest.approx(outcomes["injected"] / rows)


def test_how_improbable_the_demonstrations_are_is_logged(run):
    """A random model gives each of its 17 tokens about the same probability, which the paper's loss can teach."""
    for logged in run.steps:
        assert logged["hapo/injected/group_share"] > 0
        quantile, median = (logged[f"hapo/demonstration/least_probability_{name}"] for name in ("q05", "median"))
        assert 0.005 < quantile <= median < 0.3
        assert logged["hapo/demonstration/untaught_tokens"] == logged["hapo/demonstration/with_untaught_token"] == 0
        assert not any("hapo_count" in name for name in logged)


def test_one_demonstration_per_group_reached_the_loss_with_exactly_its_tokens(run, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows_of = by_uid(run.loss_rows, lambda row: row["uid"])
    answers = {
        info["index"]: text for info, text in zip(run.train["extra_info"], run.train["demonstration"], strict=True)
    }
    injected = [group for group in run.groups if group["outcome"] == "injected"]
    assert injected
    for group in run.groups:
        demonstrations = [row for row in rows_of[group["uid"]] if row["hapo_demonstration"]]
        assert len(demonstrations) == (EPOCHS if group["outcome"] == "injected" else 0)
        for row in demonstrations:
            expected = [*tokenizer.encode(answers[group["index"]], add_special_tokens=False), tokenizer.eos_token_id]
            assert row["responses"] == expected
            assert row["response_mask"] == [1] * len(expected)


def test_only_the_replaced_rollout_is_missing(run):
    dumped = by_uid(run.dumped, lambda row: row["uid"].split("_")[0])
    for group in run.groups:
        rows = dumped[group["uid"]]
        assert len(rows) == len(group["scores"])
        expected = sorted(group["scores"])
        if group["outcome"] == "injected":
            expected = sorted([*expected[1:], 1.0])
        assert sorted(row["score"] for row in rows) == expected


def test_advantages_in_the_loss_equal_verls_grpo_on_the_rows_after_injection(run):
    dumped = by_uid(run.dumped, lambda row: row["uid"].split("_")[0])
    rows_of = by_uid(run.loss_rows, lambda row: row["uid"])
    for group in run.groups:
        scores = torch.tensor([[row["score"]] for row in dumped[group["uid"]]])
        verls, _ = compute_grpo_outcome_advantage(scores.clone(), torch.ones_like(scores), np.zeros(len(scores)))
        expected = sorted(verls.flatten().tolist() * EPOCHS)
        assert sorted(row["advantages"][0] for row in rows_of[group["uid"]]) == pytest.approx(expected, abs=1e-6)
        for row in rows_of[group["uid"]]:
            if row["hapo_demonstration"]:
                assert row["advantages"][0] == max(expected, key=abs)


def test_rollout_correction_and_its_comparison_leave_demonstrations_out(run):
    for logged in run.steps:
        # vLLM and the actor agree on the tokens that vLLM sampled; they would not if demonstrations were included.
        assert logged["training/rollout_probs_diff_max"] < 1e-4
        assert logged["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert abs(logged["rollout_corr/kl"]) < 1e-3


def test_a_reference_model_and_the_losses_are_logged(run):
    assert run.steps[-1]["actor/kl_loss"] > 0
    assert run.steps[0]["hapo/loss/demonstration"] < 0
    assert 0 < run.steps[0]["hapo/demonstration/probability"] < 0.2
    assert all(np.isfinite(logged["actor/grad_norm"]) and logged["actor/grad_norm"] > 0 for logged in run.steps)


def test_validation_saw_the_whole_held_out_set_and_injected_nothing(run):
    assert run.steps[-1]["val-core/reverse_digits/acc/mean@1"] < 0.5
