"""The two ends: a gate that never fires trains exactly as verl's GRPO, and the asynchronous trainer injects as well."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import PROMPTS, QUICKSTART

pytestmark = pytest.mark.e2e

# Plain SGD: Adam would divide a difference in the last bits by another one.
SCRIPTED = [
    "actor_rollout_ref.rollout.agent.default_agent_loop=scripted",
    "actor_rollout_ref.actor.optim.optimizer=SGD",
    "actor_rollout_ref.actor.optim.lr=0.1",
    "trainer.save_freq=3",
    "trainer.test_freq=-1",
]
GRPO = [
    "algorithm.adv_estimator=grpo",
    f"trainer.v1.sampler.custom_sampler.path={QUICKSTART / 'eager_replay_buffer.py'}",
    "trainer.v1.sampler.custom_sampler.name=EagerReplayBuffer",
]
HAPO = ["+hapo=paper", "hapo.poll_interval=0.05", "hapo.trace_dir={folder}/trace"]


def parameters(run):
    (path,) = (run.folder / "checkpoints" / "global_step_3" / "actor").glob("model_world_size_1_rank_0.pt")
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in torch.load(path, weights_only=False).items()
    }


def test_with_no_row_injected_three_steps_end_at_the_parameters_of_verls_grpo(trainer, model):
    hapo = trainer("hapo_never", *HAPO, "trainer.v1.trainer_mode=hapo_sync", "hapo.gate.threshold=0.0", *SCRIPTED)
    grpo = trainer("verl_grpo", *GRPO, *SCRIPTED)
    assert not any(row["hapo_demonstration"] for row in hapo.loss_rows)

    ours, verls = parameters(hapo), parameters(grpo)
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert ours.keys() == verls.keys()
    moved = max((ours[name] - start[name]).abs().max().item() for name in ours)
    difference = max((ours[name] - verls[name]).abs().max().item() for name in ours)
    # verl's worker puts row by row and ours group by group, so a gradient adds its rows up in another order: the
    # difference is one of the last bits of fp32, not of what is computed.
    assert moved > 1e-2
    assert difference < 1e-6 * max(1, moved)


def test_the_colocated_asynchronous_trainer_injects_and_filters(trainer):
    run = trainer(
        "hapo_colocate_async",
        *HAPO,
        "trainer.v1.trainer_mode=hapo_colocate_async",
        "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=acc",
        "actor_rollout_ref.model.use_remove_padding=true",
        unusable=True,
    )
    trained = [group["outcome"] for group in run.groups]
    # An all-failed group without a demonstration has no signal and is filtered; one that was rescued is kept.
    assert trained == ["injected"] * (3 * PROMPTS)
    assert sum(s.get("training/filter_groups/evicted_samples", 0) for s in run.steps) > 0
    assert sum(row["hapo_demonstration"] for row in run.loss_rows) == 3 * PROMPTS
    assert all("training/off_policy/trajectory_staleness/mean" in s for s in run.steps)
