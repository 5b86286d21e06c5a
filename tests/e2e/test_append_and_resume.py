"""Demonstrations as rows of their own, in the asynchronous trainer, and a gate that remembers across a kill."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from hapo_verl.adapters.gatekeeper import Gatekeeper
from hapo_verl.config import HapoConfig
from tests.e2e.conftest import PROMPTS, ROLLOUTS
from tests.e2e.test_limits import SCRIPTED

pytestmark = pytest.mark.e2e
TRACED = ["hapo.poll_interval=0.05", "hapo.trace_dir={folder}/trace", "hapo.injection.mode=append"]
STEPS = 3


@pytest.fixture(scope="module")
def asynchronous(trainer):
    return trainer(
        "append_async",
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
        unusable=True,
        steps=STEPS,
    )


def test_the_colocated_asynchronous_trainer_injects_and_filters(asynchronous):
    # An all-failed group without a demonstration has no signal and is filtered; one that was rescued is kept.
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


def test_every_rollout_stays_and_the_demonstration_is_one_row_more(asynchronous):
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


def test_appended_rows_make_the_two_mini_batches_larger_and_no_third_one(asynchronous):
    # 8 x 9 rows in two mini-batches are two of 40; verl's own multiple of 32 would make a third out of padding.
    assert len(asynchronous.loss_rows) == STEPS * 80
    trained = Counter(row["uid"] for row in asynchronous.loss_rows if any(row["response_mask"]))
    assert set(trained.values()) == {ROLLOUTS + 1}


POSTERIOR = [
    "+hapo=paper",
    *TRACED,
    "trainer.v1.trainer_mode=hapo_sync",
    "hapo.gate.name=posterior",
    "hapo.gate.threshold=0.3",
    "hapo.budget.share=0.75",
    *SCRIPTED,
    "trainer.save_freq=2",
]


def decisions(run, step):
    return {
        group["index"]: {key: group[key] for key in ("key", "scores", "confidence", "firing", "fired", "outcome")}
        for group in run.groups
        if group["step"] == step
    }


@pytest.mark.long
def test_a_run_killed_at_step_three_and_resumed_decides_as_if_nothing_had_happened(trainer):
    # 16 prompts, 8 a step: from step 3 on every prompt was seen before.
    killed = trainer("killed", *POSTERIOR, steps=6, rows=2 * PROMPTS, killed_at=3)
    checkpoint = killed.folder / "checkpoints" / "global_step_2"
    assert (checkpoint / "hapo_gate.npz").exists()
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"]
    resumed = trainer("resumed", *POSTERIOR, *resume, steps=4, rows=2 * PROMPTS)

    assert {group["step"] for group in resumed.groups} == {3, 4}
    assert decisions(resumed, 3) == decisions(killed, 3)
    outcomes = Counter(group["outcome"] for group in resumed.groups)
    assert outcomes["injected"] > 0
    assert outcomes["not_fired"] > 0
    for step in (1, 2, 3):
        assert sum(d["outcome"] == "injected" for d in decisions(killed, step).values()) <= 0.75 * PROMPTS
    # And as the rule says, from the outcomes of the two steps before the kill.
    keeper = Gatekeeper(HapoConfig.parse({"gate": {"name": "posterior", "threshold": 0.3}}), total_steps=6)
    rows = resumed.train.to_dict("records")
    keeper.know(rows, prompt_column="prompt")
    for step in (1, 2):
        keeper.observe([group for group in killed.groups if group["step"] == step])
    for index, decision in decisions(resumed, 3).items():
        (row,) = [row for row in rows if row["extra_info"]["index"] == index]
        columns = {name: [row[name]] for name in ("data_source", "extra_info", "prompt")}
        (given,) = keeper.situations(columns | {"raw_prompt": [row["prompt"]]}, 3, prompt_column="prompt")
        a, b = given["prior_success"], given["prior_failure"]
        assert (a, b) != (1.0, 1.0)
        assert decision["confidence"] == (a + sum(decision["scores"])) / (a + b + ROLLOUTS)
