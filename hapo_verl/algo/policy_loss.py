"""The policy loss of a batch with demonstrations in it.

    the policy's own row    ℓ = PPO's clipped surrogate of ρ = π/π_old (dual clip included)
    a demonstration         ℓ = −A · F_κ(π),    F_κ = (f^κ − 1)/κ,    f(q) = q / (q + λ)
                            ∂F_κ/∂log π = λ q^κ / (q + λ)^(κ+1)

    loss = agg(ℓ) − c_H · agg(H) + c_KL · agg(KL of the policy's own rows)

A demonstration was not sampled from a known policy: it has no ratio, no clip and no KL estimate, and the probability
under its author is taken as 1. The cases of κ and λ:

- κ = 1 is LUFFY's policy shaping f (arXiv 2504.14945), which the HAPO paper uses too. Its gradient is largest, A/4, at
  π = λ and falls like π/λ for tokens that the policy would never write; a demonstration with one such token is never
  learned.
- κ = 0 is log f. Its gradient A·λ/(π + λ) is about A for those tokens, and small for tokens that the policy knows.
- λ = inf replaces f by π: κ = 0 is then the log-likelihood, κ = 1 the likelihood itself.

`trsft` (TRAPO, arXiv 2512.17636) and `chord` (arXiv 2508.11408) are weights of log π outside this family. Their F is
the integral of the weight, so the gradients are those of the papers but the values of the loss are not. `THEORY.md`
lists the weights of all methods. Both kinds of rows go through one aggregation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_kernels.dispatch import Impl
from hapo_kernels.policy_head import PolicyHead, policy_head
from hapo_kernels.policy_loss import Aggregation, Clip, EntropyBonus, KLPenalty, PolicyLoss, Teacher, policy_loss
from hapo_kernels.policy_loss.reference import aggregate, shaped

__all__ = [
    "UNCLIPPED",
    "Aggregation",
    "Clip",
    "DemonstrationShape",
    "EntropyBonus",
    "KLPenalty",
    "PolicyHead",
    "PolicyLoss",
    "hapo_policy_head",
    "hapo_policy_loss",
    "likelihood_loss",
]


@dataclass(frozen=True)
class DemonstrationShape:
    """The weight ∂F/∂log π of a demonstration's token as a function of its probability q.

    Attributes:
        name: `power`: λq^κ/(q+λ)^(κ+1), or q^κ if λ = inf; `trsft`: min(q/λ, 1); `chord`: q(1 − q).
        shaping: λ > 0; not used by `chord`.
        exponent: κ in [0, 1]; used by `power` only.
    """

    name: str
    shaping: float
    exponent: float

    def teacher(self, demonstration_B: Tensor) -> Teacher:
        """The kernels' argument for demonstration rows with this shape; `demonstration_B` is (B,) bool."""
        return Teacher(demonstration_B, self.shaping, exponent=self.exponent, shape=self.name)

    def weight(self, logp: Tensor) -> Tensor:
        """∂F/∂log π at each log-probability (nats), in the shape of `logp`; no gradient flows through it."""
        with torch.enable_grad():
            leaf = logp.detach().clone().requires_grad_()
            value = shaped(leaf, self.teacher(torch.ones(1, dtype=torch.bool)))
            return torch.autograd.grad(value.sum(), leaf)[0]

    @property
    def largest_weight(self) -> float:
        """The largest weight that any token can have."""
        return self.teacher(torch.ones(1, dtype=torch.bool)).largest_weight


# No clipping of the ratio; only the bounds ±20 on log ρ remain.
UNCLIPPED = Clip(low=math.inf, high=math.inf, dual=math.inf)


def hapo_policy_loss(
    policy_logp_BT: Tensor,
    old_logp_BT: Tensor | None,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    demonstration_B: Tensor,
    *,
    shape: DemonstrationShape,
    clip: Clip,
    aggregation: Aggregation,
    importance_weight_BT: Tensor | None = None,
    kl: KLPenalty | None = None,
    entropy: EntropyBonus | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Loss and metrics of one micro-batch; the gradient flows through `policy_logp_BT`.

    Args:
        policy_logp_BT: (B, T) log-probabilities of the rows' tokens under the policy in training, nats.
        old_logp_BT: (B, T) log-probabilities under the policy that sampled, nats; not read on demonstrations. None
            means that they equal `policy_logp_BT`.
        advantage_BT: (B, T), or (B,) with one advantage a row.
        mask_BT: (B, T), nonzero on the tokens that train.
        demonstration_B: (B,) bool, True on demonstrations.
        shape: the weight of a demonstration's tokens.
        clip: clip range of the policy's own rows.
        aggregation: verl's `loss_agg_mode` with the normalisers of the global batch.
        importance_weight_BT: (B, T) weights of a rollout correction, for the policy's own rows.
        kl: KL penalty towards a reference model, with its coefficient.
        entropy: entropy bonus, with its coefficient.
        impl: `hapo.kernels.policy_loss`.
    """
    return policy_loss(
        policy_logp_BT,
        old_logp_BT,
        advantage_BT,
        mask_BT,
        clip=clip,
        aggregation=aggregation,
        teacher=shape.teacher(demonstration_B),
        importance_weight_BT=importance_weight_BT,
        kl=kl,
        entropy=entropy,
        impl=impl,
    )


def hapo_policy_head(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    label_BT: Tensor,
    old_logp_BT: Tensor | None,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    demonstration_B: Tensor,
    *,
    bias_V: Tensor | None,
    temperature: Tensor,
    shape: DemonstrationShape,
    clip: Clip,
    aggregation: Aggregation,
    importance_weight_BT: Tensor | None = None,
    kl: KLPenalty | None = None,
    entropy_coefficient: float = 0.0,
    memory_gib: float | None = None,
    active_tokens: int | None = None,
    training_tokens: int | None = None,
    impl: Impl = "auto",
) -> PolicyHead:
    """`hapo_policy_loss` computed from hidden states; the gradient is already computed in the forward pass.

    Args:
        hidden_BTH: (B, T, H) hidden states; the one at a position predicts `label_BT` at the same position.
        weight_VH, bias_V: weight (V, H) and bias (V,) of the language-model head.
        label_BT: (B, T) ids of the rows' tokens.
        temperature: (B, T) sampling temperatures, > 0.
        old_logp_BT ... kl: as for `hapo_policy_loss`.
        entropy_coefficient ... training_tokens: as for `hapo_kernels.policy_head.policy_head`.
        impl: `hapo.kernels.policy_loss`.
    """
    return policy_head(
        hidden_BTH,
        weight_VH,
        label_BT,
        old_logp_BT,
        advantage_BT,
        mask_BT,
        clip=clip,
        aggregation=aggregation,
        teacher=shape.teacher(demonstration_B),
        importance_weight_BT=importance_weight_BT,
        kl=kl,
        entropy_coefficient=entropy_coefficient,
        bias_V=bias_V,
        temperature=temperature,
        memory_gib=memory_gib,
        active_tokens=active_tokens,
        training_tokens=training_tokens,
        impl=impl,
    )


def likelihood_loss(policy_logp_BT: Tensor, weight_B: Tensor, mask_BT: Tensor, aggregation: Aggregation) -> Tensor:
    """The likelihood term −agg(W · log π) of one micro-batch, a scalar, for objectives that weight likelihoods.

    Args:
        policy_logp_BT: (B, T) log-probabilities of the rows' tokens under the policy in training, nats.
        weight_B: (B,) weight W of each row; no gradient flows through it.
        mask_BT: (B, T), nonzero on the tokens that train.
        aggregation: as for `hapo_policy_loss`.
    """
    active_BT = mask_BT.bool()
    logp_BT = torch.where(active_BT, policy_logp_BT, 0.0)
    return -aggregate(weight_B.detach().to(logp_BT).unsqueeze(1) * logp_BT, active_BT, aggregation)
