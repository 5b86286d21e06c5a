"""The loss of a micro-batch as the sum of two parts: TRL's loss of the policy's own rows, and that of demonstrations.

Both are sums over tokens with the normalisers of the whole batch, so they can be computed separately and added.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hapo_verl.algo.policy_loss import UNCLIPPED, Aggregation, DemonstrationShape, PolicyLoss, hapo_policy_loss
from hapo_verl.config import HapoConfig

# Replaces the reference model's log-probability on demonstrations. It is far below any real one, so that TRL's
# exponential of the difference to the policy's does not overflow.
_UNREAD = -1e4


def without(inputs: dict[str, Any], demonstration_B: Tensor) -> dict[str, Any]:
    """The micro-batch for TRL's loss, changed so that the loss and its metrics leave demonstrations out.

    Demonstrations are marked like the tokens of tools in TRL: read by the model but not trained on. TRL still computes
    their loss and multiplies it by 0, so their values must be finite.

    Args:
        inputs: the inputs of `GRPOTrainer._compute_loss`.
        demonstration_B: (B,) bool, True on demonstrations.
    """
    mask_BT = inputs["completion_mask"]
    own = dict(inputs, tool_mask=(~demonstration_B).unsqueeze(1).expand_as(mask_BT).to(mask_BT.dtype))
    for name, value in (("old_per_token_logps", 0.0), ("ref_per_token_logps", _UNREAD)):
        if name in own:
            own[name] = own[name].masked_fill(demonstration_B.unsqueeze(1), value)
    return own


def demonstration_loss(
    policy_logp_BT: Any, inputs: dict[str, Any], demonstration_B: Tensor, hapo: HapoConfig, aggregation: Aggregation
) -> PolicyLoss:
    """The part of the loss of the demonstrations.

    Args:
        policy_logp_BT: (B, T) log-probabilities of all rows under the policy in training, nats.
        inputs: the inputs of `GRPOTrainer._compute_loss`.
        demonstration_B: (B,) bool, True on demonstrations.
        hapo: `loss` and `kernels` are read.
        aggregation: the result of `aggregation`.
    """
    impl: Any = hapo.kernels.policy_loss
    return hapo_policy_loss(
        policy_logp_BT,
        None,
        inputs["advantages"],
        inputs["completion_mask"] * demonstration_B.unsqueeze(1),
        demonstration_B,
        shape=DemonstrationShape(hapo.loss.shape, hapo.loss.shaping, hapo.loss.exponent),
        clip=UNCLIPPED,
        aggregation=aggregation,
        impl=impl,
    )


def aggregation(trainer: Any, inputs: dict[str, Any]) -> Aggregation:
    """The aggregation that equals TRL's `loss_type`, gradient accumulation included.

    Args:
        trainer: TRL's trainer, in training.
        inputs: the inputs of `GRPOTrainer._compute_loss`.
    """
    rows, passes = len(inputs["advantages"]), trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("grpo", "sapo"):
        return Aggregation("seq-mean-token-mean", global_batch_size=rows * passes)
    if trainer.loss_type == "dr_grpo":
        size = trainer.max_completion_length
        return Aggregation("seq-mean-token-sum-norm", global_batch_size=rows * passes, loss_scale_factor=size)
    tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return Aggregation("token-mean", batch_num_tokens=tokens * passes / trainer.args.steps_per_generation)
