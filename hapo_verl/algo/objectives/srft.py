"""SRFT (arXiv 2506.19767): fine-tuning and reinforcement in one step, weighted by the policy's entropy.

    H              mean token entropy of the batch's responses, without gradient
    demonstration  −0.5 e^{−H} log π  −  A f(π)         cross-entropy, and LUFFY's shaped term of `policy_loss.py`
    success        −0.1 e^{H} log π
    failure         log π

A is group-relative, with the demonstration in the statistics. The authors of SRFT published no code; the weights of the
policy's own rows are those of the only public implementation, which is part of HPT's code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hapo_verl.algo.objectives import Objective, Rows
from hapo_verl.config import checked, positive

_WEIGHT = "a weight must be positive and at most 1e6."


def _is_weight(value: Any) -> bool:
    # With larger weights an entropy of a few nats could overflow fp32.
    return positive(value) and value <= 1e6


@dataclass(frozen=True)
class Srft(Objective):
    """The objective SRFT: factors of the entropy weights, and the weight of failures."""

    name: str = "srft"
    # Factor of the demonstrations' cross-entropy, which is multiplied by exp(-H) too.
    demonstration_weight: float = checked(0.5, _is_weight, f"{_WEIGHT} Use 0.5.")
    # Factor of the log-likelihood of successful rollouts, which is multiplied by exp(H) too.
    success_weight: float = checked(0.1, _is_weight, f"{_WEIGHT} Use 0.1.")
    # Factor with which the log-likelihood of failed rollouts is pushed down.
    failure_weight: float = checked(1.0, _is_weight, f"{_WEIGHT} Use 1.0.")
    reads: ClassVar[frozenset[str]] = frozenset({"entropy"})
    binary_scores: ClassVar[bool] = True
    # No weight is 0, so every row has a gradient.
    idle_rows: ClassVar[bool] = False

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor, tokens_B: Tensor) -> Tensor:
        return torch.where(demonstration_B, advantage_B, 0.0)

    def likelihood_weight(self, rows: Rows) -> Tensor:
        entropy = (rows.entropy_B * rows.tokens_B).sum() / rows.tokens_B.sum().clamp(min=1)
        own_B = torch.where(rows.score_B > 0.5, self.success_weight * entropy.exp(), -self.failure_weight)
        return torch.where(rows.demonstration_B, self.demonstration_weight * (-entropy).exp(), own_B)
