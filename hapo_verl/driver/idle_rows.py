"""Saves work in a step: decides whether rows without a gradient, and the pass for old log-probs, can be left out.

With sparse rewards most rows have advantage 0, because all rollouts of their group failed or all succeeded. Advantages
need only rewards, so they are computed first, and the batch is reduced to the rows with a gradient before the actor
gets it. Loss, gradient and optimizer step are the same as with all rows: every row stays in its mini-batch, and the
normalisers are counted here, over the left-out rows too, and sent with the rows (`hapo_mini_batch`).

Before an update verl computes every row's log-probs, the old ones of the ratio. If a step has only one update, the
policy has not changed until then, so the log-probs of the update itself are the old ones and no pass is needed.
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
    """The work that the steps of a launch leave out: an empty string if it is left out, else the reason why not.

    Attributes:
        idle_rows: rows without a gradient, in the update.
        idle_scores: old log-probs of these rows, and with them verl's metrics of that pass over all rows.
        old_log_probs: the whole pass for old log-probs.
    """

    idle_rows: str
    idle_scores: str
    old_log_probs: str

    def lines(self) -> list[str]:
        """The sentences about it for the log of a run."""
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
    """Decide what the steps of a launch leave out."""
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
    """The number of mini-batches in a batch."""
    prompts = config.data.train_batch_size // _parameter_sync_step(config)
    return -(-prompts // config.actor_rollout_ref.actor.ppo_mini_batch_size)


def counted(
    tokens_B: Tensor, active_B: Tensor, demonstration_B: Tensor, group_B: Tensor, mini_batches: int, dp_size: int
) -> Tensor:
    """The counts (`MiniBatch`) of the mini-batch that each row belongs to, (B, 4) int64.

    Args:
        tokens_B: (B,) number of tokens in `loss_mask`, as verl counts them, including tokens that rollout correction
            has rejected.
        active_B: (B,) number of tokens that train.
        demonstration_B: (B,) bool, True on demonstrations.
        group_B: (B,) int64 id of each row's prompt.
        mini_batches: number of mini-batches of the step.
        dp_size: number of data-parallel ranks.
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
