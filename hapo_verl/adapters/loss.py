"""The HAPO loss in verl's actor: a loss function for `set_loss_fn`, which sees every field of a micro-batch.

verl's own policy losses are handed seven tensors and could not tell a demonstration from a rollout.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.padding import no_padding_2_padding

from hapo_verl.adapters.rows import (
    DEMONSTRATION,
    LIKELIHOOD_WEIGHT,
    OBJECTIVE_LOSS,
    SINGLE_UPDATE,
    demonstration_flags,
    whole_step,
)
from hapo_verl.adapters.trace import Trace
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
        dp_group: not used; the normalisers are global already.

    Raises:
        RuntimeError: when a row did not pass HAPO's agent loop.
    """
    fused: PolicyHead | None = model_output.pop(POLICY_HEAD, None)  # pyright: ignore[reportAssignmentType]
    likelihood: dict[str, Any] = {}
    entropy_BT: Tensor | None = None
    if fused is not None:
        loss, metrics = fused.loss, fused.metrics
        if tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False):
            entropy_BT = fused.entropy_BT
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
    Trace(hapo.trace_dir).loss_rows(data, names=[name for name in names if name in data])
    values = metrics._asdict()
    if entropy_BT is not None:
        mask: Any = data["response_mask"]
        values["entropy_sum"] = torch.where(mask.to_padded_tensor(0).bool(), entropy_BT.detach(), 0.0).sum()
    return loss, _metrics(values, config) | likelihood


def loss_terms(config: ActorConfig, hapo: HapoConfig, data: TensorDict, device: torch.device) -> dict[str, Any]:
    """What the loss of a micro-batch takes beside the policy's own log-probabilities and entropy.

    Normalisers are those of the whole optimizer step, whatever rows of it were left out.
    """
    whole = whole_step(data)
    demonstration_B = demonstration_flags(data)
    names = ["response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob"]
    rows = data.select(*(name for name in names if name in data)).to_padded_tensor()
    clip_low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    clip_high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    clip = Clip(low=clip_low, high=clip_high, dual=config.get("clip_ratio_c", 3.0))
    single_update = tu.get_non_tensor_data(data=data, key=SINGLE_UPDATE, default=False)
    return {
        # Of a step's only update they may not have been computed: the policy in training is the one they are of.
        "old_logp_BT": rows.get("old_log_probs", None) if single_update else rows["old_log_probs"],
        "advantage_BT": rows["advantages"],
        "mask_BT": rows["response_mask"].bool(),
        "demonstration_B": demonstration_B.to(device),
        "shape": DemonstrationShape(hapo.loss.shape, hapo.loss.shaping, hapo.loss.exponent),
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


def _metrics(values: dict[str, Tensor], config: ActorConfig) -> dict[str, Any]:
    """verl's names for what verl logs too; every contribution carries the global normaliser, so all are added up."""
    named = {
        "actor/pg_loss": values.pop("on_policy_loss") + values["teacher_loss"],
        "hapo/loss/demonstration": values.pop("teacher_loss"),
    }
    named["hapo/loss/on_policy"] = named["actor/pg_loss"] - named["hapo/loss/demonstration"]
    kl_loss, entropy_loss = values.pop("kl_loss"), values.pop("entropy")
    if config.use_kl_loss:
        named["kl_loss"] = kl_loss
    if "entropy_sum" in values:
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


def token_means(metrics: dict[str, Any], *, trained_share: float | None = None) -> dict[str, float]:
    """The token means that the sums of `hapo_loss` stand for; takes the sums out of `metrics`.

    Args:
        metrics: the actor's metrics after verl has added up micro-batches and averaged mini-batches and ranks.
        trained_share: of the policy's own tokens, how many the loss has seen, where rows without a gradient may be left
            out; None where they never are. Such a token is never clipped, but its entropy and its ratio are not known:
            their means are over the trained tokens, and say so.
    """
    prefix = "actor/" + TOKEN_SUM
    sums = {name.removeprefix(prefix): metrics.pop(name) for name in list(metrics) if name.startswith(prefix)}
    if not sums:
        return {}
    on_policy, demonstration = max(sums["on_policy_tokens"], 1), max(sums["teacher_tokens"], 1)
    share = 1.0 if trained_share is None else trained_share
    means = {
        "actor/pg_clipfrac": sums["clipped_tokens"] / on_policy * share,
        "actor/pg_clipfrac_lower": sums["dual_clipped_tokens"] / on_policy * share,
        "actor/ppo_kl" if trained_share is None else "hapo/trained/ppo_kl": sums["log_ratio_sum"] / on_policy,
        "hapo/demonstration/probability": sums["teacher_probability_sum"] / demonstration,
    }
    if trained_share is not None and "entropy_sum" in sums:
        del metrics["actor/entropy_loss"]
        tokens = max(sums["on_policy_tokens"] + sums["teacher_tokens"], 1)
        means["hapo/trained/entropy_loss"] = sums["entropy_sum"] / tokens
    return means
