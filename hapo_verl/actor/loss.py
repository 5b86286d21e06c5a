"""The HAPO loss in verl's actor: a loss function for `set_loss_fn`, which gets every field of a micro-batch.

verl's own policy losses get seven fixed tensors, none of which tells a demonstration from a rollout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.padding import no_padding_2_padding

from hapo_verl.algo import teachability
from hapo_verl.algo.policy_loss import (
    UNCLIPPED,
    Aggregation,
    Clip,
    EntropyBonus,
    KLPenalty,
    PolicyHead,
    hapo_policy_loss,
    likelihood_loss,
)
from hapo_verl.config import HapoConfig
from hapo_verl.protocol.rows import (
    DEMONSTRATION,
    LIKELIHOOD_WEIGHT,
    OBJECTIVE_LOSS,
    OWN_OLD_LOG_PROBS,
    TRACED,
    demonstration_flags,
    mini_batch,
)
from hapo_verl.protocol.shape import demonstration_shape, untaught_below
from hapo_verl.protocol.trace import Trace

# Prefix of sums over tokens. The trainer turns them into means after all micro-batches are added up.
TOKEN_SUM = "hapo_token_sum/"
# Prefix of the counts of `teachability.count`, which reach the trainer the same way.
COUNT = "hapo_count/"
# Prefix of metrics over the rows that were trained on, while verl's metrics are over all rows of the batch.
TRAINED = "hapo/trained/"
# Key in the model's output under which `hapo.kernels.head=policy_head` puts the loss.
POLICY_HEAD = "hapo_policy_head"


def hapo_loss(
    config: ActorConfig, hapo: HapoConfig, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a micro-batch, to be differentiated, and its metrics, with the signature that verl requires.

    If rows without a gradient were left out, the normalisers are those of the mini-batch including these rows
    (`hapo_mini_batch`), and verl's counts of the remaining rows are not used.

    Args:
        config: verl's actor configuration; clip ranges, `loss_agg_mode`, entropy and KL settings are read.
        hapo: the `hapo:` block.
        model_output: `log_probs` and, if asked for, `entropy`, over whole sequences; or the loss itself, if the head
            has computed it. That entry is removed, since verl's later code handles only tensors.
        data: the micro-batch, one jagged tensor per field.
        dp_group: not used; the normalisers in `data` are global already.

    Raises:
        RuntimeError: if a row did not come from HAPO's agent loop.
    """
    fused: PolicyHead | None = model_output.pop(POLICY_HEAD, None)  # pyright: ignore[reportAssignmentType]
    likelihood: dict[str, Any] = {}
    if fused is not None:
        loss, metrics, policy_logp_BT = fused.loss, fused.metrics, fused.logp_BT
        asked = tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False)
        entropy_BT = fused.entropy_BT if asked else None
    else:
        policy_logp_BT, entropy = no_padding_2_padding(model_output["log_probs"], data), model_output.get("entropy")
        entropy_BT = None if entropy is None else no_padding_2_padding(entropy, data)
        terms = loss_terms(config, hapo, data, policy_logp_BT.device)
        loss, metrics = hapo_policy_loss(
            policy_logp_BT,
            **terms,
            entropy=None if entropy_BT is None else EntropyBonus(entropy_BT, config.entropy_coeff),
        )
        if hapo.objective.weighs_likelihood:
            weight_B: Any = data[LIKELIHOOD_WEIGHT]
            term = likelihood_loss(policy_logp_BT, weight_B, terms["mask_BT"], terms["aggregation"])
            loss = loss + term
            likelihood = _likelihood_metrics(term, hapo, data)
    names = ("uid", "responses", DEMONSTRATION, "advantages", "response_mask", LIKELIHOOD_WEIGHT)
    if (trace := Trace.of(hapo)).is_on:
        sampled: Any = tu.get_non_tensor_data(data=data, key=TRACED, default=None)
        sampled = None if sampled is None else sampled.split(",")
        trace.loss_rows(data, [name for name in names if name in data], policy_logp_BT, sampled=sampled)
    reported = _metrics(metrics._asdict(), config, has_entropy=entropy_BT is not None) | likelihood
    whole = mini_batch(data)
    if whole is not None:
        on_policy_tokens = whole.on_policy_tokens / data["dp_size"]
        reported[TOKEN_SUM + "whole_on_policy_tokens"] = Metric(AggregationType.MEAN, on_policy_tokens)
        if entropy_BT is not None:
            del reported["actor/entropy_loss"]
            reported |= _token_sums({"entropy_sum": entropy_BT}, _own_tokens(data, demonstrations=True))
    if _has_no_old_log_probs(data) and "rollout_log_probs" in data:
        reported |= _comparison(policy_logp_BT.detach(), data)
    return loss, reported | _demonstration_counts(hapo, data, policy_logp_BT)


def loss_terms(config: ActorConfig, hapo: HapoConfig, data: TensorDict, device: torch.device) -> dict[str, Any]:
    """The arguments of `hapo_policy_loss` for a micro-batch, except the policy's log-probabilities and the entropy.

    `old_logp_BT` is None if it equals the policy's own log-probabilities.
    """
    demonstration_B, whole = demonstration_flags(data), mini_batch(data)
    names = ["response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob"]
    rows = data.select(*(name for name in names if name in data)).to_padded_tensor()
    clip_low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    clip_high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    clip = Clip(low=clip_low, high=clip_high, dual=config.get("clip_ratio_c", 3.0))
    return {
        "old_logp_BT": None if _has_no_old_log_probs(data) else rows["old_log_probs"],
        "advantage_BT": rows["advantages"],
        "mask_BT": rows["response_mask"].bool(),
        "demonstration_B": demonstration_B.to(device),
        "shape": demonstration_shape(hapo),
        "clip": clip if hapo.loss.clip else UNCLIPPED,
        "aggregation": Aggregation(
            mode=config.loss_agg_mode,
            dp_size=data["dp_size"],
            batch_num_tokens=data["batch_num_tokens"] if whole is None else whole.tokens,
            global_batch_size=data["global_batch_size"] if whole is None else whole.rows,
            loss_scale_factor=config.loss_scale_factor,
        ),
        "importance_weight_BT": rows.get("rollout_is_weights", None),
        "kl": KLPenalty(rows["ref_log_prob"], config.kl_loss_type, config.kl_loss_coef) if config.use_kl_loss else None,
        "impl": hapo.kernels.policy_loss,
    }


def _has_no_old_log_probs(data: TensorDict) -> bool:
    return bool(tu.get_non_tensor_data(data=data, key=OWN_OLD_LOG_PROBS, default=False))


def _own_tokens(data: TensorDict, *, demonstrations: bool) -> Tensor:
    """A mask of the tokens that train, (B, T) bool; with or without those of demonstrations."""
    active_BT = data.select("response_mask").to_padded_tensor()["response_mask"].bool()
    return active_BT if demonstrations else active_BT & ~demonstration_flags(data).to(active_BT.device).unsqueeze(1)


def _token_sums(values: dict[str, Tensor], where_BT: Tensor) -> dict[str, Any]:
    """Sums over these tokens, for `token_means`; in fp64, since some sums are subtracted from each other later."""
    return {
        TOKEN_SUM + name: Metric(AggregationType.SUM, value_BT.detach()[where_BT].double().sum())
        for name, value_BT in values.items()
    }


def _comparison(policy_logp_BT: Tensor, data: TensorDict) -> dict[str, Any]:
    """Sums that compare the rollout engine's and the actor's probabilities of the policy's own tokens.

    verl makes this comparison in its separate pass for old log-probs, which did not run.
    """
    own_BT = _own_tokens(data, demonstrations=False)
    rollout_BT = data.select("rollout_log_probs").to_padded_tensor()["rollout_log_probs"].to(policy_logp_BT).exp()
    actor_BT = policy_logp_BT.exp()
    difference_BT = torch.where(own_BT, (actor_BT - rollout_BT).abs(), 0.0)
    sums = {
        "difference_sum": difference_BT,
        "actor_sum": actor_BT,
        "rollout_sum": rollout_BT,
        "actor_square_sum": actor_BT.double().square(),
        "rollout_square_sum": rollout_BT.double().square(),
        "product_sum": actor_BT.double() * rollout_BT,
    }
    largest = Metric(AggregationType.MAX, difference_BT.max())
    return _token_sums(sums, own_BT) | {TRAINED + "rollout_probs_diff_max": largest}


def _metrics(values: dict[str, Tensor], config: ActorConfig, *, has_entropy: bool) -> dict[str, Any]:
    """The metrics of a micro-batch, under verl's names where verl logs them too.

    Every value is already divided by the global normaliser, so micro-batches are summed.
    """
    named = {
        "actor/pg_loss": values.pop("on_policy_loss") + values["teacher_loss"],
        "hapo/loss/demonstration": values.pop("teacher_loss"),
    }
    named["hapo/loss/on_policy"] = named["actor/pg_loss"] - named["hapo/loss/demonstration"]
    kl_loss, entropy_loss = values.pop("kl_loss"), values.pop("entropy")
    if config.use_kl_loss:
        named["kl_loss"] = kl_loss
    if has_entropy:
        named["actor/entropy_loss"] = entropy_loss
    named |= {TOKEN_SUM + name: value for name, value in values.items()}
    metrics: dict[str, Any] = {name: Metric(AggregationType.SUM, value) for name, value in named.items()}
    if config.use_kl_loss:
        metrics["kl_coef"] = config.kl_loss_coef
    return metrics


def _likelihood_metrics(term: Tensor, hapo: HapoConfig, data: TensorDict) -> dict[str, Any]:
    metrics: dict[str, Any] = {"hapo/loss/likelihood": Metric(AggregationType.SUM, term.detach())}
    own: Any = tu.get_non_tensor_data(data=data, key=OBJECTIVE_LOSS, default=None)
    if own is not None:
        metrics[f"hapo/loss/{hapo.objective.name}"] = Metric(AggregationType.MEAN, own)
    return metrics


def _demonstration_counts(hapo: HapoConfig, data: TensorDict, policy_logp_BT: Tensor) -> dict[str, Any]:
    counts = teachability.count(
        policy_logp_BT.detach(),
        _own_tokens(data, demonstrations=True),
        demonstration_flags(data).to(policy_logp_BT.device),
        untaught_below=untaught_below(hapo),
    )
    # A single copy from the device. Every micro-batch reports every name, since verl adds up by position.
    return {f"{COUNT}{i}": Metric(AggregationType.SUM, value) for i, value in enumerate(counts.tolist())}


def demonstration_means(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics of the demonstrations from the counts of `hapo_loss`; removes the counts from `metrics`.

    Args:
        metrics: as for `token_means`. verl has scaled all counts by the same factor, which does not matter.
    """
    prefix = "actor/" + COUNT
    counts = [metrics.pop(name) for name in [f"{prefix}{i}" for i in range(teachability.COUNTED)] if name in metrics]
    described = teachability.describe(counts) if counts else {}
    return {f"hapo/demonstration/{name}": value for name, value in described.items()}


def token_means(metrics: dict[str, Any]) -> dict[str, float]:
    """Means over tokens from the sums of `hapo_loss`; removes the sums from `metrics`.

    A row that was left out has advantage 0, and a token with advantage 0 is never clipped. So `pg_clipfrac` is over all
    of the policy's own tokens, as if they had been trained on. The other means are over the tokens that were trained
    on; if rows were left out, their names start with `hapo/trained/`.
    There is no mean over the tokens of demonstrations in a step without one.

    Args:
        metrics: the actor's metrics after verl has added up micro-batches and averaged mini-batches and ranks.
    """
    prefix = "actor/" + TOKEN_SUM
    sums = {name.removeprefix(prefix): metrics.pop(name) for name in list(metrics) if name.startswith(prefix)}
    if not sums:
        return {}
    whole = "whole_on_policy_tokens" in sums
    trained = max(sums["on_policy_tokens"], 1)
    on_policy = max(sums["whole_on_policy_tokens"], 1) if whole else trained
    means = {
        "actor/pg_clipfrac": sums["clipped_tokens"] / on_policy,
        "actor/pg_clipfrac_lower": sums["dual_clipped_tokens"] / on_policy,
        TRAINED + "ppo_kl" if whole else "actor/ppo_kl": sums["log_ratio_sum"] / trained,
    }
    if sums["teacher_tokens"]:
        name = TRAINED + "demonstration_probability" if whole else "hapo/demonstration/probability"
        means[name] = sums["teacher_probability_sum"] / sums["teacher_tokens"]
    if "entropy_sum" in sums:
        tokens = max(sums["on_policy_tokens"] + sums["teacher_tokens"], 1)
        means[TRAINED + "entropy_loss"] = sums["entropy_sum"] / tokens
    return means | _compared(sums)


def _compared(sums: dict[str, float]) -> dict[str, float]:
    """verl's comparison of rollout engine and actor, under verl's names with our prefix, from `_comparison`'s sums."""
    tokens = sums["on_policy_tokens"] if "difference_sum" in sums else 0
    if not tokens:
        return {}
    actor, rollout = sums["actor_sum"] / tokens, sums["rollout_sum"] / tokens
    variances = [
        sums["actor_square_sum"] / tokens - actor**2,
        sums["rollout_square_sum"] / tokens - rollout**2,
    ]
    covariance = sums["product_sum"] / tokens - actor * rollout
    spread = math.sqrt(max(variances[0], 0.0) * max(variances[1], 0.0))
    return {
        TRAINED + "rollout_probs_diff_mean": sums["difference_sum"] / tokens,
        TRAINED + "rollout_actor_probs_pearson_corr": covariance / spread if spread else math.nan,
    }
