"""A micro-batch's loss in two parts that add up: TRL's, of the policy's own rows, and the demonstrations'.

Both are sums over tokens with the normalisers of the whole batch, so that it does not matter who computes which.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hapo_verl.algo.policy_loss import UNCLIPPED, Aggregation, DemonstrationShape, PolicyLoss, hapo_policy_loss
from hapo_verl.config import HapoConfig

# In the place of a reference's log-probability where it is not read: far below any, so that no exponential overflows.
_UNREAD = -1e4


def without(inputs: dict[str, Any], demonstration_B: Tensor) -> dict[str, Any]:
    """TRL's micro-batch with demonstrations that its loss and its metrics leave out.

    They are marked as what TRL calls tokens of tools: read by the model, not trained on. What stands there is still
    computed and multiplied by 0, so it has to be finite.

    Args:
        inputs: of `GRPOTrainer._compute_loss`.
        demonstration_B: (B,) bool.
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
    """The demonstrations' part.

    Args:
        policy_logp_BT: (B, T) of all rows under the policy in training, nats.
        inputs: of `GRPOTrainer._compute_loss`.
        demonstration_B: (B,) bool.
        hapo: `loss` and `kernels` are read.
        aggregation: TRL's.
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
    """What TRL's `loss_type` divides by, gradient accumulation included.

    Args:
        trainer: TRL's, in training.
        inputs: of `GRPOTrainer._compute_loss`.
    """
    rows, passes = len(inputs["advantages"]), trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("grpo", "sapo"):
        return Aggregation("seq-mean-token-mean", global_batch_size=rows * passes)
    if trainer.loss_type == "dr_grpo":
        size = trainer.max_completion_length
        return Aggregation("seq-mean-token-sum-norm", global_batch_size=rows * passes, loss_scale_factor=size)
    tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return Aggregation("token-mean", batch_num_tokens=tokens * passes / trainer.args.steps_per_generation)
