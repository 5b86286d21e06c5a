"""The head and the loss, one after the other, gradient by autograd."""

from __future__ import annotations

from torch import Tensor

from hapo_kernels.linear_logprob import reference as head
from hapo_kernels.policy_loss import reference as loss
from hapo_kernels.policy_loss.terms import Aggregation, Clip, EntropyBonus, KLPenalty, PolicyLossMetrics, Teacher


def policy_head(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    label_BT: Tensor,
    behaviour_logp_BT: Tensor,
    advantage: Tensor,
    active_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None,
    importance_weight_BT: Tensor | None,
    kl: KLPenalty | None,
    entropy_coefficient: float,
    bias_V: Tensor | None,
    temperature_N: Tensor,
    chunk_rows: int | None,
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    """See `hapo_kernels.policy_head.policy_head`; the whole logits are made, so there is nothing to cut into chunks."""
    logp_N, entropy_N = head.linear_logprob(
        hidden_BTH.flatten(0, -2), weight_VH, label_BT.flatten(), temperature_N, bias_V, active_BT.flatten(), True
    )
    logp_BT, entropy_BT = logp_N.view_as(label_BT), entropy_N.view_as(label_BT)
    result = loss.policy_loss(
        logp_BT,
        behaviour_logp_BT,
        advantage,
        active_BT,
        clip=clip,
        aggregation=aggregation,
        teacher=teacher,
        importance_weight_BT=importance_weight_BT,
        kl=kl,
        entropy=EntropyBonus(entropy_BT, entropy_coefficient),
    )
    return result.loss, result.metrics, logp_BT.detach(), entropy_BT.detach()
