"""REAL, "Rewards as Labels" (arXiv 2602.05630): a group's rewards are labels, its mean log-ratios are logits.

    s_i = mean over the tokens of row i of log π − log π_old
    L   = log(1 + Σ₊ exp(−s_i/τ)) + log(1 + Σ₋ exp(s_j/τ))          Σ₊: rows of reward 1, Σ₋: rows of reward 0

summed over the groups that have both classes, divided by the number of all groups. No ratio is clipped: a row's weight
|∂L/∂s| = e^{∓s/τ} / (τ (1 + Σ)) is at most 1/τ by itself. It needs the s of the whole group, which lie in other
micro-batches and on other ranks, so they are obtained first and the loss is differentiated as −Σ W log π.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hapo_verl.algo.objectives import Objective, Rows
from hapo_verl.config import checked, positive


@dataclass(frozen=True)
class Real(Objective):
    """τ is `temperature`."""

    name: str = "real"
    temperature: float = checked(0.5, positive, "the temperature of the logits s/tau must be positive. Use 0.5.")
    reads: ClassVar[frozenset[str]] = frozenset({"log_ratio"})
    whole_groups: ClassVar[bool] = True
    binary_scores: ClassVar[bool] = True
    # s is a mean over tokens, L a mean over groups.
    aggregation: ClassVar[str | None] = "seq-mean-token-mean"

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor) -> Tensor:
        return torch.zeros_like(advantage_B)

    def trains(self, score_B: Tensor, group_B: Tensor, advantage_B: Tensor) -> Tensor:
        """The rows of the groups that have both classes."""
        class_B, both_G = _classes(score_B, group_B)
        return both_G[class_B // 2]

    def likelihood_weight(self, rows: Rows) -> Tensor:
        logit_B, class_B, total_C, both_G = self._logits(rows)
        weight_B = (logit_B - total_C[class_B]).exp() / self.temperature * both_G[class_B // 2]
        # Divided by groups here, by rows in the aggregation.
        weight_B = weight_B * (rows.batch_size / _groups(rows, both_G))
        return torch.where(class_B % 2 == 1, weight_B, -weight_B)

    def loss(self, rows: Rows) -> Tensor:
        _, _, total_C, both_G = self._logits(rows)
        return total_C.view(-1, 2)[both_G].sum() / _groups(rows, both_G)

    def _logits(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row ∓s/τ and its class; of each class log(1 + Σ); whether a group has both classes."""
        class_B, both_G = _classes(rows.score_B, rows.group_B)
        logit_B = torch.where(class_B % 2 == 1, -rows.log_ratio_B, rows.log_ratio_B) / self.temperature
        # The 1 of 1 + Σ is the logit 0.
        peak_C = logit_B.new_zeros(2 * both_G.numel()).scatter_reduce(0, class_B, logit_B, "amax")
        sum_C = (-peak_C).exp().index_add(0, class_B, (logit_B - peak_C[class_B]).exp())
        return logit_B, class_B, peak_C + sum_C.log(), both_G


def _classes(score_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row its class 2g + r; whether a group has both classes."""
    ids_G, group_B = torch.unique(group_B, return_inverse=True)
    class_B = 2 * group_B + (score_B > 0.5)
    return class_B, torch.bincount(class_B, minlength=2 * ids_G.numel()).view(-1, 2).all(dim=1)


def _groups(rows: Rows, both_G: Tensor) -> int:
    return both_G.numel() if rows.groups is None else rows.groups
