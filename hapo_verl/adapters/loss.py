"""The HAPO loss in verl's actor: a loss function for `set_loss_fn`, which sees every field of a micro-batch.

verl's own policy losses are handed seven tensors and could not tell a demonstration from a rollout.
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

from hapo_verl.adapters.rows import DEMONSTRATION, LIKELIHOOD_WEIGHT, OBJECTIVE_LOSS, demonstration_flags
from hapo_verl.adapters.trace import Trace
from hapo_verl.algo import teachability
from hapo_verl.algo.policy_loss import (
    UNCLIPPED,
    Aggregation,
    Clip,
    DemonstrationShape,
    EntropyBonus,
    KLPenalty,
    PolicyHead,
    hapo_policy_loss,
    likelihood_loss,
)
from hapo_verl.config import HapoConfig

# Prefix of token sums on their way to the trainer, which turns them into means once all micro-batches are added up.
TOKEN_SUM = "hapo_token_sum/"
# Prefix of what is counted of the demonstrations, on the same way.
COUNT = "hapo_count/"
# Where `hapo.kernels.head=policy_head` leaves the loss in the model's output.
POLICY_HEAD = "hapo_policy_head"


def hapo_loss(
    config: ActorConfig, hapo: HapoConfig, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """verl's loss contract: the micro-batch's loss, to be differentiated, and its metrics.

    Args:
        config: verl's actor configuration; clip ranges, `loss_agg_mode`, entropy and KL settings are read.
        hapo: the `hapo:` block.
        model_output: `log_probs` and, where wanted, `entropy`, over whole sequences; or the loss itself, where the
            head has computed it. It is taken out: verl's bookkeeping knows tensors only.
        data: the micro-batch, one jagged tensor a field.
        dp_group: not used; the normalisers in `data` are global already.

    Raises:
        RuntimeError: when a row did not pass HAPO's agent loop.
    """
    fused: PolicyHead | None = model_output.pop(POLICY_HEAD, None)  # pyright: ignore[reportAssignmentType]
    likelihood: dict[str, Any] = {}
    if fused is not None:
        loss, metrics, policy_logp_BT = fused.loss, fused.metrics, fused.logp_BT
        has_entropy = bool(tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False))
    else:
        policy_logp_BT, entropy = no_padding_2_padding(model_output["log_probs"], data), model_output.get("entropy")
        has_entropy = entropy is not None
        terms = loss_terms(config, hapo, data, policy_logp_BT.device)
        loss, metrics = hapo_policy_loss(
            policy_logp_BT,
            **terms,
            entropy=None
            if entropy is None
            else EntropyBonus(no_padding_2_padding(entropy, data), config.entropy_coeff),
        )
        if hapo.objective.weighs_likelihood:
            weight_B: Any = data[LIKELIHOOD_WEIGHT]
            term = likelihood_loss(policy_logp_BT, weight_B, terms["mask_BT"], terms["aggregation"])
            loss = loss + term
            likelihood = _likelihood_metrics(term, hapo, data)
    names = ("uid", "responses", DEMONSTRATION, "advantages", "response_mask", LIKELIHOOD_WEIGHT)
    Trace(hapo.trace_dir).loss_rows(data, names=[name for name in names if name in data])
    of_demonstrations = _demonstration_counts(hapo, data, policy_logp_BT)
    return loss, _metrics(metrics._asdict(), config, has_entropy=has_entropy) | likelihood | of_demonstrations


def loss_terms(config: ActorConfig, hapo: HapoConfig, data: TensorDict, device: torch.device) -> dict[str, Any]:
    """What the loss of a micro-batch takes beside the policy's own log-probabilities and entropy."""
    demonstration_B = demonstration_flags(data)
    names = ["response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob"]
    rows = data.select(*(name for name in names if name in data)).to_padded_tensor()
    clip_low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    clip_high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    clip = Clip(low=clip_low, high=clip_high, dual=config.get("clip_ratio_c", 3.0))
    return {
        "old_logp_BT": rows["old_log_probs"],
        "advantage_BT": rows["advantages"],
        "mask_BT": rows["response_mask"].bool(),
        "demonstration_B": demonstration_B.to(device),
        "shape": demonstration_shape(hapo),
        "clip": clip if hapo.loss.clip else UNCLIPPED,
        "aggregation": Aggregation(
            mode=config.loss_agg_mode,
            dp_size=data["dp_size"],
            batch_num_tokens=data["batch_num_tokens"],
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=config.loss_scale_factor,
        ),
        "importance_weight_BT": rows.get("rollout_is_weights", None),
        "kl": KLPenalty(rows["ref_log_prob"], config.kl_loss_type, config.kl_loss_coef) if config.use_kl_loss else None,
        "impl": hapo.kernels.policy_loss,
    }


def _metrics(values: dict[str, Tensor], config: ActorConfig, *, has_entropy: bool) -> dict[str, Any]:
    """verl's names for what verl logs too; every contribution carries the global normaliser, so all are added up."""
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


def demonstration_shape(hapo: HapoConfig) -> DemonstrationShape:
    """`hapo.loss.shape`, with its λ and κ."""
    return DemonstrationShape(hapo.loss.shape, hapo.loss.shaping, hapo.loss.exponent)


def untaught_below(hapo: HapoConfig) -> float:
    """log π below which a demonstration's token is hardly pushed, nats; −inf where the objective weighs likelihoods."""
    return -math.inf if hapo.objective.weighs_likelihood else teachability.untaught_below(demonstration_shape(hapo))


def _demonstration_counts(hapo: HapoConfig, data: TensorDict, policy_logp_BT: Tensor) -> dict[str, Any]:
    mask: Any = data["response_mask"]
    counts = teachability.count(
        policy_logp_BT.detach(),
        mask.to_padded_tensor(0).bool(),
        demonstration_flags(data).to(policy_logp_BT.device),
        untaught_below=untaught_below(hapo),
    )
    # One copy from the device, and every name in every micro-batch: verl adds up by position.
    return {f"{COUNT}{i}": Metric(AggregationType.SUM, value) for i, value in enumerate(counts.tolist())}


def demonstration_means(metrics: dict[str, Any]) -> dict[str, float]:
    """What the counts of `hapo_loss` say of the demonstrations; takes the counts out of `metrics`.

    Args:
        metrics: as for `token_means`. What verl makes of a count is the same multiple of its sum for all counts.
    """
    prefix = "actor/" + COUNT
    counts = [metrics.pop(name) for name in [f"{prefix}{i}" for i in range(teachability.COUNTED)] if name in metrics]
    described = teachability.describe(counts) if counts else {}
    return {f"hapo/demonstration/{name}": value for name, value in described.items()}


def token_means(metrics: dict[str, Any]) -> dict[str, float]:
    """The token means that the sums of `hapo_loss` stand for; takes the sums out of `metrics`.

    Args:
        metrics: the actor's metrics after verl has added up micro-batches and averaged mini-batches and ranks.
    """
    prefix = "actor/" + TOKEN_SUM
    sums = {name.removeprefix(prefix): metrics.pop(name) for name in list(metrics) if name.startswith(prefix)}
    if not sums:
        return {}
    on_policy, demonstration = max(sums["on_policy_tokens"], 1), max(sums["teacher_tokens"], 1)
    return {
        "actor/pg_clipfrac": sums["clipped_tokens"] / on_policy,
        "actor/pg_clipfrac_lower": sums["dual_clipped_tokens"] / on_policy,
        "actor/ppo_kl": sums["log_ratio_sum"] / on_policy,
        "hapo/demonstration/probability": sums["teacher_probability_sum"] / demonstration,
    }
