"""What a step need not compute: rows that cannot move the policy, and a pass for old log-probs that nobody reads.

With sparse rewards most rows have advantage 0: those of a group that failed, or succeeded, as a whole. Rewards are all
that advantages need, so they come first, and the batch shrinks to the rows with a gradient before the actor sees it.
Loss, gradient and optimizer step stay those of all rows: mini-batches keep their members, and normalisers are counted
here, over rows that are left out too, and travel with the rows (`hapo_mini_batch`).

verl asks the policy for every row's log-probs before it updates: they are the old ones of the ratio. Where a step is
one update, the policy has not changed by then, so the update's own log-probs are these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from hapo_verl.config import HapoConfig
from hapo_verl.driver.mini_batches import mini_batch_of
from hapo_verl.protocol.rows import MiniBatch


class Savings(NamedTuple):
    """What the steps of a launch leave out: of each an empty string, or why it is not left out.

    Attributes:
        idle_rows: rows without a gradient, in the update.
        idle_scores: their old log-probs, and so verl's metrics of that pass over all rows.
        old_log_probs: all old log-probs.
    """

    idle_rows: str
    idle_scores: str
    old_log_probs: str

    def lines(self) -> list[str]:
        """For the log of a run."""
        rows, scores, passes = self
        lines = [f"every row is trained on: {rows}" if rows else "rows without a gradient are not trained on"]
        if scores:
            lines.append(f"old log-probs are computed of every row: {scores}")
        elif passes:
            lines.append(f"old log-probs are computed of rows that are trained on, in a pass: {passes}")
        else:
            lines.append("old log-probs are those of the update itself, no pass is run for them")
        if not (rows and scores):
            lines.append("metrics over the rows that are trained on begin with hapo/trained/")
        return lines


def savings(config: DictConfig, hapo: HapoConfig) -> Savings:
    """What the steps of a launch leave out."""
    idle_rows, passes = _why_idle_rows_train(config, hapo), _why_a_pass(config)
    scores = _why_every_row_is_scored(config, hapo)
    if not scores and idle_rows and passes:
        scores = f"{passes}; {idle_rows}"
    return Savings(idle_rows, scores, scores or passes)


def _why_idle_rows_train(config: DictConfig, hapo: HapoConfig) -> str:
    actor = config.actor_rollout_ref.actor
    if not hapo.skip_idle_rows:
        return "hapo.skip_idle_rows=false"
    if not hapo.objective.idle_rows:
        return f"hapo.objective.name={hapo.objective.name} gives every row a gradient"
    if actor.use_kl_loss:
        return "actor_rollout_ref.actor.use_kl_loss=True gives every rollout a gradient"
    if actor.entropy_coeff != 0:
        return f"actor_rollout_ref.actor.entropy_coeff={actor.entropy_coeff} gives every row a gradient"
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        return (
            "actor_rollout_ref.actor.loss_scale_factor=null divides by the longest row of a micro-batch, which may be "
            "one without a gradient"
        )
    if actor.shuffle and _updates(config) > 1:
        return "actor_rollout_ref.actor.shuffle=True leaves it to the workers which rows make a mini-batch"
    if actor.strategy not in ("fsdp", "fsdp2"):
        return f"actor_rollout_ref.actor.strategy={actor.strategy} was not tried without them"
    if OmegaConf.select(config, "actor_rollout_ref.actor.fsdp_config.qat.enable"):
        return "actor_rollout_ref.actor.fsdp_config.qat.enable=True learns scales from every row"
    return ""


def _why_every_row_is_scored(config: DictConfig, hapo: HapoConfig) -> str:
    if hapo.old_log_probs == "all":
        return "hapo.old_log_probs=all"
    for name in ("rollout_is", "rollout_rs"):
        value = OmegaConf.select(config, f"algorithm.rollout_correction.{name}")
        if value is not None:
            return f"algorithm.rollout_correction.{name}={value} reads them"
    return ""


def _why_a_pass(config: DictConfig) -> str:
    actor = config.actor_rollout_ref.actor
    if _parameter_sync_step(config) > 1:
        return "trainer.v1.separate_async.parameter_sync_step makes several updates a step"
    if actor.ppo_epochs > 1:
        return f"actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs} makes several updates a step"
    if _updates(config) > 1:
        return f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} makes several updates a step"
    return ""


def _parameter_sync_step(config: DictConfig) -> int:
    mode = config.trainer.v1.trainer_mode.removeprefix("hapo_")
    return OmegaConf.select(config, f"trainer.v1.{mode}.parameter_sync_step") or 1


def _updates(config: DictConfig) -> int:
    """Mini-batches of a batch."""
    prompts = config.data.train_batch_size // _parameter_sync_step(config)
    return -(-prompts // config.actor_rollout_ref.actor.ppo_mini_batch_size)


def counted(
    tokens_B: Tensor, active_B: Tensor, demonstration_B: Tensor, group_B: Tensor, mini_batches: int, dp_size: int
) -> Tensor:
    """(B, 4) int64: of each row the `MiniBatch` that it belongs to.

    Args:
        tokens_B: (B,) tokens of `loss_mask`, which verl counts: what rollout correction has rejected is among them.
        active_B: (B,) tokens that train.
        demonstration_B: (B,) bool.
        group_B: (B,) int64 id of each row's prompt.
        mini_batches: of the step.
        dp_size: data-parallel ranks.
    """
    mini_batch_B = torch.tensor(mini_batch_of(len(tokens_B), mini_batches, dp_size))
    counts = []
    for number in range(mini_batches):
        in_B = mini_batch_B == number
        counts.append(
            MiniBatch(
                rows=int(in_B.sum()),
                tokens=int(tokens_B[in_B].sum()),
                on_policy_tokens=int(active_B[in_B & ~demonstration_B].sum()),
                groups=group_B[in_B & (active_B > 0)].unique().numel(),
            )
        )
    return torch.tensor(counts, dtype=torch.int64)[mini_batch_B]
