"""Which launches may leave out rows without a gradient, and which need no pass for old log-probs."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from hapo_verl.config import HapoConfig

# Other engines may add losses of their own: those that balance experts read every row.
STRATEGIES = ("fsdp", "fsdp2")
_WITH_REPLAY = ("megatron", "veomni")
# Prefix of what is measured over the trained rows alone.
TRAINED = "hapo/trained/"


def why_no_row_is_left_out(config: Any, hapo: HapoConfig) -> str | None:
    """What gives every row of this launch a gradient, as `key=value, reason`; None where the advantages decide."""
    actor = config.actor_rollout_ref.actor
    if not hapo.skip_idle_rows:
        return "hapo.skip_idle_rows=false"
    if hapo.objective.every_row_trains:
        return f"hapo.objective.name={hapo.objective.name} moves the policy with every row"
    if corrects_rollouts(config):
        return "algorithm.rollout_correction reads the old log-probs of every row before advantages are known"
    if actor.use_kl_loss:
        return "actor_rollout_ref.actor.use_kl_loss=True moves the policy with every row"
    if actor.entropy_coeff != 0:
        return f"actor_rollout_ref.actor.entropy_coeff={actor.entropy_coeff} moves the policy with every row"
    if actor.strategy not in STRATEGIES:
        return f"actor_rollout_ref.actor.strategy={actor.strategy} may have losses beside the policy's"
    if actor.shuffle and actor.ppo_mini_batch_size < config.data.train_batch_size:
        return "actor_rollout_ref.actor.shuffle=True draws the rows of a mini-batch from all rows"
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        return "actor_rollout_ref.actor.loss_scale_factor=None divides by the longest row of a micro-batch"
    return None


def corrects_rollouts(config: Any) -> bool:
    """Whether verl's rollout correction weighs or rejects tokens, which takes old log-probs."""
    correction = OmegaConf.select(config, "algorithm.rollout_correction")
    chosen = correction is not None and (correction.get("rollout_is") or correction.get("rollout_rs"))
    return bool(chosen) and compares_rollouts(config)


def compares_rollouts(config: Any) -> bool:
    """Whether verl computes the metrics of its rollout correction, as it does wherever that block is there."""
    correction = OmegaConf.select(config, "algorithm.rollout_correction")
    return correction is not None and config.actor_rollout_ref.rollout.calculate_log_probs


def needs_old_log_probs(config: Any, hapo: HapoConfig, *, single_update: bool) -> bool:
    """Whether the pass for old log-probs is to run.

    Args:
        config: the whole configuration.
        hapo: its `hapo:` block.
        single_update: the step has one update, of the policy that the pass would score with.
    """
    # Its pass also records how experts were chosen.
    replays = [OmegaConf.select(config, f"actor_rollout_ref.actor.{of}.router_replay.mode") for of in _WITH_REPLAY]
    auto = hapo.old_log_probs == "auto" and all(mode in (None, "disabled") for mode in replays)
    return not (auto and single_update) or corrects_rollouts(config)


def over_trained_rows(metrics: dict[str, Any]) -> dict[str, Any]:
    """verl's metrics of old log-probs under names that say they are over the trained rows."""
    return {TRAINED + name.removeprefix("actor/").removeprefix("training/"): value for name, value in metrics.items()}
