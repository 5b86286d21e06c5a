"""The head and then the loss in PyTorch, with the gradient by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hapo_kernels.linear_logprob import reference as head
from hapo_kernels.policy_loss import reference as loss
from hapo_kernels.policy_loss.terms import EntropyBonus, PolicyLossMetrics


def policy_head(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    label_BT: Tensor,
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    active_BT: Tensor,
    *,
    bias_V: Tensor | None,
    vocabulary_group: ProcessGroup | None,
    main_grad_VH: Tensor | None,
    temperature_N: Tensor,
    **terms,
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    """See `hapo_kernels.policy_head.policy_head`; all logits are computed at once, without chunks."""
    if main_grad_VH is not None:
        weight_VH = head.adds_to(main_grad_VH, weight_VH)
    rows = (hidden_BTH.flatten(0, -2), weight_VH, label_BT.flatten(), temperature_N, bias_V, active_BT.flatten(), True)
    if vocabulary_group is None:
        logp_N, entropy_N = head.linear_logprob(*rows)
    else:
        logp_N, entropy_N = head.vocabulary_parallel(*rows, vocabulary_group)
    return _loss(logp_N, entropy_N, behaviour_logp_BT, advantage, active_BT, **terms)


def policy_loss_from_logits(
    logits_BTV: Tensor,
    label_BT: Tensor,
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    active_BT: Tensor,
    *,
    temperature_N: Tensor,
    **terms,
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    """See `hapo_kernels.policy_head.policy_loss_from_logits`."""
    row = active_BT.flatten().nonzero()[:, 0]
    logits_NV = logits_BTV.flatten(0, -2)[row]
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logp_N, entropy_N = head.from_logits(logits_NV, label_BT.flatten(), temperature_N, row, True)
    return _loss(logp_N, entropy_N, behaviour_logp_BT, advantage, active_BT, **terms)


def _loss(
    logp_N: Tensor,
    entropy_N: Tensor,
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    active_BT: Tensor,
    *,
    entropy_coefficient: float,
    **terms,
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    """The policy loss from log-probabilities; `terms` are those of `policy_loss`."""
    logp_BT, entropy_BT = logp_N.view(active_BT.shape), entropy_N.view(active_BT.shape)
    entropy = EntropyBonus(entropy_BT, entropy_coefficient)
    behaviour_logp_BT = logp_BT.detach() if behaviour_logp_BT is None else behaviour_logp_BT
    result = loss.policy_loss(logp_BT, behaviour_logp_BT, advantage, active_BT, entropy=entropy, **terms)
    return result.loss, result.metrics, logp_BT.detach(), entropy_BT.detach()
