"""The entry `algorithm.adv_estimator=hapo` in verl's registry of advantage estimators.

The HAPO trainers do not call it; they compute advantages from one score per row (`trainer.py`). verl's other trainers
call it without saying which rows are demonstrations. Nothing is injected there, and the run would be GRPO under another
name, so the call is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from hapo_kernels.segment_norm import segment_ids
from hapo_verl.algo.advantage import group_advantage
from hapo_verl.config import ConfigError


@register_adv_est("hapo")
def hapo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    config: Any = None,
    demonstration: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Group-relative advantages with the signature of verl's estimators.

    Args:
        token_level_rewards: (B, T) rewards, summed over T.
        response_mask: (B, T), 1 on the policy's (or the demonstration's) tokens.
        index: B prompt ids.
        config: verl's `algorithm` block; `norm_adv_by_std_in_grpo` is read.
        demonstration: (B,) bool, True on injected rows.

    Returns:
        Advantages and returns, both (B, T), the same tensor.

    Raises:
        ConfigError: if the caller does not say which rows are demonstrations.
    """
    if demonstration is None:
        raise ConfigError(
            "algorithm.adv_estimator=hapo: this trainer injects no demonstrations. "
            "Launch with +hapo=paper trainer.v1.trainer_mode=hapo_sync."
        )
    scale_by_std = True if config is None else bool(config.get("norm_adv_by_std_in_grpo", True))
    advantage_B = group_advantage(
        token_level_rewards.sum(dim=-1), segment_ids(index).to(token_level_rewards.device), scale_by_std=scale_by_std
    )
    advantage_BT = advantage_B.unsqueeze(-1) * response_mask
    return advantage_BT, advantage_BT
