"""The policy loss in PyTorch, with the gradient by autograd.

The operations and their order are those of verl (`compute_policy_loss_vanilla`, `kl_penalty`, `agg_loss`), so that
without teacher rows the bits are the same too. Inputs at tokens that do not count are replaced by 0 before anything is
computed, because a zero gradient times an infinite derivative would be NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hapo_kernels.policy_loss.terms import (
    Aggregation,
    Clip,
    EntropyBonus,
    KLPenalty,
    PolicyLoss,
    PolicyLossMetrics,
    Teacher,
)


def policy_loss(
    policy_logp_BT: Tensor,
    behaviour_logp_BT: Tensor,
    advantage: Tensor,
    mask_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None,
    importance_weight_BT: Tensor | None,
    kl: KLPenalty | None,
    entropy: EntropyBonus | None,
) -> PolicyLoss:
    """See `hapo_kernels.policy_loss.policy_loss`."""
    active_BT = mask_BT.bool()
    teacher_BT = active_BT & teacher.row_B[:, None] if teacher else torch.zeros_like(active_BT)
    on_policy_BT = active_BT & ~teacher_BT

    def only(where_BT: Tensor, value: Tensor) -> Tensor:
        value = value if policy_logp_BT.dtype == torch.float64 else value.float()
        return torch.where(where_BT, value.expand_as(where_BT), 0.0)

    def total(value_BT: Tensor) -> Tensor:
        return aggregate(value_BT, active_BT, aggregation)

    advantage_BT = only(active_BT, (advantage if advantage.ndim == 2 else advantage[:, None]).detach())
    policy_BT = only(on_policy_BT, policy_logp_BT)
    log_ratio_BT = torch.clamp(policy_BT - only(on_policy_BT, behaviour_logp_BT.detach()), min=-20.0, max=20.0)
    loss_BT, clipped_BT, dual_clipped_BT = clipped_surrogate(log_ratio_BT, advantage_BT, clip)
    if importance_weight_BT is not None:
        loss_BT = loss_BT * only(on_policy_BT, importance_weight_BT.detach())

    zero = policy_BT.new_zeros(())
    teacher_loss = teacher_probability = zero
    on_policy_loss_BT = loss_BT.detach()
    if teacher is not None:
        teacher_policy_BT = only(teacher_BT, policy_logp_BT)
        log_q_BT = teacher_policy_BT
        if teacher.logp_BT is not None:
            log_q_BT = log_q_BT - only(teacher_BT, teacher.logp_BT.detach())
        loss_BT = torch.where(teacher_BT, -advantage_BT * shaped(log_q_BT, teacher), loss_BT)
        teacher_loss = total(loss_BT.detach() * teacher_BT)
        teacher_probability = (teacher_policy_BT.detach().exp() * teacher_BT).sum()
        on_policy_loss_BT = on_policy_loss_BT * on_policy_BT

    loss, entropy_sum, kl_loss = total(loss_BT), zero, zero
    if entropy is not None:
        entropy_sum = total(only(active_BT, entropy.entropy_BT))
        if entropy.coefficient:
            loss = loss - entropy.coefficient * entropy_sum
    if kl is not None:
        kl_BT = kl_penalty(policy_BT, only(on_policy_BT, kl.reference_logp_BT.detach()), kl.kind)
        kl_loss = total(kl_BT)
        loss = loss + kl_loss * kl.coefficient

    return PolicyLoss(
        loss,
        PolicyLossMetrics(
            on_policy_loss=total(on_policy_loss_BT),
            teacher_loss=teacher_loss,
            kl_loss=kl_loss.detach(),
            entropy=entropy_sum.detach(),
            on_policy_tokens=on_policy_BT.sum().to(zero.dtype),
            teacher_tokens=teacher_BT.sum().to(zero.dtype),
            # At other tokens ρ = 1, which is never clipped.
            clipped_tokens=clipped_BT.sum().to(zero.dtype),
            dual_clipped_tokens=dual_clipped_BT.sum().to(zero.dtype),
            log_ratio_sum=-log_ratio_BT.detach().sum(),
            teacher_probability_sum=teacher_probability,
        ),
    )


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """The loss max(-Aρ, -A clip(ρ, 1-low, 1+high)), for A < 0 at most -A·dual, and where each of the clips holds."""
    ratio = torch.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1 - clip.low, 1 + clip.high)
    pessimistic = torch.maximum(unclipped, clipped)
    bound = -advantage * clip.dual
    loss = torch.where(advantage < 0, torch.min(bound, pessimistic), pessimistic)
    return loss, clipped > unclipped, (pessimistic > bound) & (advantage < 0)


def shaped(log_q: Tensor, teacher: Teacher) -> Tensor:
    """F of the teacher's shape from log q, computed in log space; its derivative ∂F/∂log q is the token's weight.

    power     (f^κ - 1)/κ, f = q/(q+λ); κ = 1 is f itself and κ = 0 is log f; for λ = inf, f is q
    trsft     q/λ below q = λ, 1 + log(q/λ) above
    chord     q - q²/2
    """
    if teacher.shape == "chord":
        # As (1 - (1-q)²)/2 the derivative q(1-q) is exact even for q close to 1.
        return 0.5 - 0.5 * expm1(log_q).square()
    if teacher.shape == "trsft":
        log_ratio = log_q - math.log(teacher.shaping)
        return torch.where(log_ratio < 0, log_ratio.clamp(max=0.0).exp(), 1.0 + log_ratio)
    if teacher.exponent == 1:
        return torch.exp(log_q) if teacher.shaping == math.inf else torch.sigmoid(log_q - math.log(teacher.shaping))
    log_f = log_q if teacher.shaping == math.inf else logsigmoid(log_q - math.log(teacher.shaping))
    return log_f if teacher.exponent == 0 else expm1(teacher.exponent * log_f) / teacher.exponent


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 with the derivative exp(x); torch's derivative is the rounded result + 1, so 0 for x far below 0."""
    power = torch.exp(x)
    return torch.expm1(x.detach()) + (power - power.detach())


def kl_penalty(policy_logp: Tensor, reference_logp: Tensor, kind: str) -> Tensor:
    """Estimate of KL(π || π_ref) for each token, from a token sampled from π (http://joschu.net/blog/kl-approx.html).

    k1 = log π - log π_ref,    abs = |k1|,    k2 = k1²/2,    k3 = r - 1 - log r,  r = π_ref/π, clamped as verl clamps.
    """
    if kind.endswith("+"):
        value = kl_penalty(policy_logp, reference_logp, kind[:-1]).detach()
        gradient = 0.5 * (policy_logp - reference_logp).square()
        return gradient - gradient.detach() + value
    if kind in ("k1", "kl"):
        return policy_logp - reference_logp
    if kind == "abs":
        return (policy_logp - reference_logp).abs()
    if kind in ("k2", "mse"):
        return 0.5 * (policy_logp - reference_logp).square()
    log_r = torch.clamp(reference_logp - policy_logp, min=-20, max=20)
    return torch.clamp(torch.exp(log_r) - log_r - 1, min=-10, max=10)


def aggregate(value_BT: Tensor, active_BT: Tensor, how: Aggregation) -> Tensor:
    """The sum over the micro-batch, weighted by `how`. `value_BT` must be finite where `active_BT` is False."""
    if how.mode == "token-sum":
        return torch.where(active_BT, value_BT, 0.0).sum() * how.dp_size
    if how.mode == "token-mean":
        tokens = at_least_one(active_BT.sum() if how.batch_num_tokens is None else how.batch_num_tokens)
        return torch.where(active_BT, value_BT, 0.0).sum() / tokens * how.dp_size

    tokens_B = active_BT.sum(-1)
    row_B = (value_BT * active_BT).sum(-1)
    if how.mode == "seq-mean-token-mean":
        row_B = row_B / (tokens_B + 1e-8)
    own_rows = (tokens_B > 0).to(value_BT.dtype).sum()
    rows = at_least_one(own_rows if how.global_batch_size is None else how.global_batch_size)
    total = row_B.sum() / rows * how.dp_size
    if how.mode == "seq-mean-token-sum-norm":
        total = total / (max(active_BT.shape[-1], 1) if how.loss_scale_factor is None else how.loss_scale_factor)
    return total


def at_least_one(count: int | Tensor) -> int | Tensor:
    """A normaliser of at least 1: without any token or row the sum is 0, and so the mean is 0 too."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def row_weight(active_BT: Tensor, how: Aggregation) -> Tensor:
    """The weights w_B (fp64) with aggregate(v) = Σ_B w_B Σ_T v: each mode is linear, so one number per row suffices."""
    one_B = torch.ones(active_BT.shape[0], dtype=torch.float64, device=active_BT.device) * how.dp_size
    if how.mode == "token-sum":
        return one_B
    if how.mode == "token-mean":
        return one_B / at_least_one(active_BT.sum() if how.batch_num_tokens is None else how.batch_num_tokens)
    tokens_B = active_BT.sum(-1)
    weight_B = one_B / at_least_one((tokens_B > 0).sum() if how.global_batch_size is None else how.global_batch_size)
    if how.mode == "seq-mean-token-sum":
        return weight_B
    if how.mode == "seq-mean-token-mean":
        return weight_B / (tokens_B + 1e-8)
    return weight_B / (max(active_BT.shape[-1], 1) if how.loss_scale_factor is None else how.loss_scale_factor)
