"""The policy loss of a batch with demonstrations in it.

    the policy's own row    ℓ = PPO's clipped surrogate of ρ = π/π_old (dual clip included)
    a demonstration         ℓ = −A · F_κ(π),    F_κ = (f^κ − 1)/κ,    f(q) = q / (q + λ)
                            ∂F_κ/∂log π = λ q^κ / (q + λ)^(κ+1)

    loss = agg(ℓ) − c_H · agg(H) + c_KL · agg(KL of the policy's own rows)

Nobody sampled a demonstration, so it has no ratio, no clip and no KL estimate; the probability of its author is taken
as 1. κ = 1 is LUFFY's policy shaping f (arXiv 2504.14945), which is also the paper's: its gradient is largest, A/4, at
π = λ and fades like π/λ for tokens that the policy would never write, so that a demonstration with one such token is
never learned. κ = 0 is log f, whose gradient λ/(π + λ) is A for those tokens and fades where the policy knows the token
already. λ = inf takes π in the place of f: κ = 0 is then log-likelihood, κ = 1 the likelihood itself. `trsft`
(TRAPO, arXiv 2512.17636) and `chord` (arXiv 2508.11408) are weights of log π outside of this family; their F is the
weight's integral, so that gradients are those of the papers and values are not. Whose weight is whose: `THEORY.md`.
Both kinds of rows go through one aggregation.
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
    """How hard a demonstration's token of probability q is pushed: its weight ∂F/∂log π.

    Attributes:
        name: `power`, λq^κ/(q+λ)^(κ+1), with λ = inf q^κ; `trsft`, min(q/λ, 1); `chord`, q(1 − q).
        shaping: λ > 0; `chord` does not read it.
        exponent: κ in [0, 1]; read by `power` alone.
    """

    name: str
    shaping: float
    exponent: float

    def teacher(self, demonstration_B: Tensor) -> Teacher:
        """The rows of this shape, as the kernels take them."""
        return Teacher(demonstration_B, self.shaping, exponent=self.exponent, shape=self.name)

    def weight(self, logp: Tensor) -> Tensor:
        """∂F/∂log π at each log-probability, nats, of the tensor's shape; no gradient flows through it."""
        with torch.enable_grad():
            leaf = logp.detach().clone().requires_grad_()
            value = shaped(leaf, self.teacher(torch.ones(1, dtype=torch.bool)))
            return torch.autograd.grad(value.sum(), leaf)[0]

    @property
    def largest_weight(self) -> float:
        """The largest weight that any token can have."""
        return self.teacher(torch.ones(1, dtype=torch.bool)).largest_weight


# A ratio that is clipped nowhere; the bounds on log ρ, ±20, remain.
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
        old_logp_BT: (B, T) under the policy that sampled; not read on demonstrations. None: the policy in training.
        advantage_BT: (B, T), or (B,) with one advantage a row.
        mask_BT: (B, T), nonzero on the tokens that train.
        demonstration_B: (B,) bool, True on demonstrations.
        shape: how hard a demonstration's token is pushed.
        clip: clip range of the policy's own rows.
        aggregation: verl's `loss_agg_mode` with the normalisers of the global batch.
        importance_weight_BT: (B, T) weights of a rollout correction, for the policy's own rows.
        kl: penalty towards a reference model, with its coefficient.
        entropy: bonus, with its coefficient.
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
    """`hapo_policy_loss` straight from hidden states, its gradient computed in the forward pass.

    Args:
        hidden_BTH: the states that predict `label_BT`, position for position.
        weight_VH, bias_V: the language-model head.
        label_BT: ids of the rows' tokens.
        temperature: (B, T), > 0.
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
    """−agg(W · log π) of one micro-batch, a scalar: the term of the objectives that weigh likelihoods.

    Args:
        policy_logp_BT: (B, T) log-probabilities of the rows' tokens under the policy in training, nats.
        weight_B: (B,) W; no gradient flows through it.
        mask_BT: (B, T), nonzero on the tokens that train.
        aggregation: as for `hapo_policy_loss`.
    """
    active_BT = mask_BT.bool()
    logp_BT = torch.where(active_BT, policy_logp_BT, 0.0)
    return -aggregate(weight_B.detach().to(logp_BT).unsqueeze(1) * logp_BT, active_BT, aggregation)
