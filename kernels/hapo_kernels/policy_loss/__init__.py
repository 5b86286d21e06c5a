"""The policy loss of a batch in which some rows were sampled from the policy and some come from a teacher.

Per active token, with A the advantage of its row:

    on-policy row     ρ = exp(clamp(log π - log π_old, ±20))
                      ℓ = max(-Aρ, -A clip(ρ, 1-low, 1+high)),    for A < 0 at most -A·dual;    ℓ ← w·ℓ
    teacher row       q = π / π_teacher,    f = q / (q + λ)
                      ℓ = -A F_κ(q),    F_κ = (f^κ - 1)/κ,    ∂F_κ/∂log π = λ q^κ / (q+λ)^(κ+1)

    loss = agg(ℓ) - c_H · agg(H) + c_KL · agg(KL)

On-policy rows: PPO, arXiv 1707.06347, with the dual clip of arXiv 1912.09729; w is the importance weight of a rollout
correction. Teacher rows: κ = 1 is the policy shaping of LUFFY, arXiv 2504.14945, where the value is f itself; κ = 0 is
log f. Each shape (`Teacher`) is computed from log q - log λ, which neither overflows nor divides 0 by 0. Teacher rows
have no ratio, clip, importance weight or KL, because these are expectations under the policy's own samples. The entropy
bonus counts on every row.

agg is one aggregation over both kinds of rows (`Aggregation`). If the global normalisers are given, loss and gradient
do not depend on how the batch is divided into micro-batches, on the order of rows, or on padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hapo_kernels.dispatch import Impl, use_triton
from hapo_kernels.policy_loss import reference
from hapo_kernels.policy_loss.terms import (
    Aggregation,
    Clip,
    EntropyBonus,
    KLPenalty,
    PolicyLoss,
    PolicyLossMetrics,
    Teacher,
)

__all__ = [
    "Aggregation",
    "Clip",
    "EntropyBonus",
    "KLPenalty",
    "PolicyLoss",
    "PolicyLossMetrics",
    "Teacher",
    "policy_loss",
]


def policy_loss(
    policy_logp_BT: Tensor,
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    mask_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None = None,
    importance_weight_BT: Tensor | None = None,
    kl: KLPenalty | None = None,
    entropy: EntropyBonus | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Loss, gradient and metrics of one micro-batch; the equations are in the module's docstring.

    Args:
        policy_logp_BT: log π of the chosen tokens under the policy being trained, nats. The gradient flows here.
        behaviour_logp_BT: log π_old of the same tokens, nats; not read on teacher rows. None means that π_old is π, so
            that ρ is 1 and its gradient is that of log π.
        advantage: (B,), one per row, or (B, T), one per token.
        mask_BT: nonzero on the tokens that train. Values at other tokens have no effect, not even NaN and inf.
        importance_weight_BT: w, multiplies the loss of on-policy tokens.

    Computed in fp32, in fp64 for fp64 log-probabilities. Without teacher rows, loss and gradient equal those of verl's
    `vanilla` loss with the same `loss_agg_mode`, to the last bit in fp32. A micro-batch without active tokens gives 0,
    where verl may divide 0 by 0.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """
    behaviour_logp_BT = policy_logp_BT.detach() if behaviour_logp_BT is None else behaviour_logp_BT
    check_tokens(policy_logp_BT, behaviour_logp_BT, advantage, mask_BT, teacher, importance_weight_BT, kl, entropy)
    if use_triton(impl, policy_logp_BT, behaviour_logp_BT, mask_BT):
        from hapo_kernels.policy_loss import kernel  # not before it is needed: Triton may be absent on a CPU

        run = kernel.policy_loss
    else:
        run = reference.policy_loss
    return run(
        policy_logp_BT,
        behaviour_logp_BT,
        advantage,
        mask_BT,
        clip=clip,
        aggregation=aggregation,
        teacher=teacher,
        importance_weight_BT=importance_weight_BT,
        kl=kl,
        entropy=entropy,
    )


def check_tokens(
    policy_logp_BT: Tensor,
    behaviour_logp_BT: Tensor,
    advantage: Tensor,
    mask_BT: Tensor,
    teacher: Teacher | None,
    importance_weight_BT: Tensor | None,
    kl: KLPenalty | None,
    entropy: EntropyBonus | None,
) -> None:
    """Raise ValueError, with one line, for inputs of `policy_loss` that do not fit together."""
    if policy_logp_BT.ndim != 2 or not policy_logp_BT.is_floating_point():
        raise ValueError(
            f"policy_logp_BT: {policy_logp_BT.dtype} of shape {tuple(policy_logp_BT.shape)}: "
            "floating-point log-probabilities of shape (B, T). Pad a jagged batch first."
        )
    shape = policy_logp_BT.shape
    if advantage.shape not in (shape, shape[:1]):
        raise ValueError(
            f"advantage of shape {tuple(advantage.shape)}: one a row or one a token. "
            f"Use {tuple(shape[:1])} or {tuple(shape)}."
        )
    per_token = {
        "behaviour_logp_BT": behaviour_logp_BT,
        "mask_BT": mask_BT,
        "importance_weight_BT": importance_weight_BT,
        "teacher.logp_BT": teacher and teacher.logp_BT,
        "kl.reference_logp_BT": kl and kl.reference_logp_BT,
        "entropy.entropy_BT": entropy and entropy.entropy_BT,
    }
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}: one value a token. "
                f"Use the shape of policy_logp_BT, {tuple(shape)}."
            )
    if teacher is not None and (teacher.row_B.shape != shape[:1] or teacher.row_B.dtype != torch.bool):
        raise ValueError(
            f"teacher.row_B: {teacher.row_B.dtype} of shape {tuple(teacher.row_B.shape)}: one bool a row. "
            f"Use a bool tensor of shape {tuple(shape[:1])}."
        )
