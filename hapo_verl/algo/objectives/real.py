"""REAL, "Rewards as Labels" (arXiv 2602.05630): a classification loss, rewards as labels and mean log-ratios as logits.

    s_i = mean over the tokens of row i of log π − log π_old
    L   = log(1 + Σ₊ exp(−s_i/τ)) + log(1 + Σ₋ exp(s_j/τ))          Σ₊: rows of reward 1, Σ₋: rows of reward 0

L is summed over the groups that have both classes and divided by the number of all groups. No clipping is needed: a
row's weight |∂L/∂s| = e^{∓s/τ} / (τ (1 + Σ)) is at most 1/τ. The weight depends on the s of the whole group, whose rows
may be in other micro-batches and on other ranks. So all s are computed first, and the gradient is that of −Σ W log π.
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
    """The objective REAL; `temperature` is τ."""

    name: str = "real"
    # tau of the logits s/tau, where s is a row's mean log-ratio between the policy in training and the old one.
    temperature: float = checked(
        0.5,
        # A weight of 1/tau has to fit fp32.
        lambda v: positive(v) and 1e-6 <= v <= 1e6,
        "the temperature of the logits s/tau lies in [1e-6, 1e6]. Use 0.5.",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"log_ratio"})
    whole_groups: ClassVar[bool] = True
    binary_scores: ClassVar[bool] = True
    # s is a mean over tokens, L a mean over groups.
    aggregation: ClassVar[str | None] = "seq-mean-token-mean"

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor, tokens_B: Tensor) -> Tensor:
        return torch.zeros_like(advantage_B)

    def has_gradient(self, advantage_B: Tensor, score_B: Tensor, group_B: Tensor) -> Tensor:
        ids_G, group_B = torch.unique(group_B, return_inverse=True)
        class_B = 2 * group_B + (score_B > 0.5)
        return _both_classes(class_B, ids_G.numel())[group_B]

    def likelihood_weight(self, rows: Rows) -> Tensor:
        logit_B, class_B, total_C, both_G = self._classes(rows)
        weight_B = (logit_B - total_C[class_B]).exp() / self.temperature * both_G[class_B // 2]
        # REAL divides by the number of groups, but the aggregation will divide by the number of rows.
        weight_B = weight_B * (rows.batch_size / rows.groups)
        return torch.where(class_B % 2 == 1, weight_B, -weight_B)

    def loss(self, rows: Rows) -> Tensor:
        _, _, total_C, both_G = self._classes(rows)
        return total_C.view(-1, 2)[both_G].sum() / rows.groups

    def _classes(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per row its logit ∓s/τ and its class 2g + r, per class log(1 + Σ), per group whether it has both classes."""
        positive_B = rows.score_B > 0.5
        logit_B = torch.where(positive_B, -rows.log_ratio_B, rows.log_ratio_B) / self.temperature
        ids_G, group_B = torch.unique(rows.group_B, return_inverse=True)
        class_B = 2 * group_B + positive_B
        # The 1 of 1 + Σ is the logit 0.
        peak_C = logit_B.new_zeros(2 * ids_G.numel()).scatter_reduce(0, class_B, logit_B, "amax")
        sum_C = (-peak_C).exp().index_add(0, class_B, (logit_B - peak_C[class_B]).exp())
        return logit_B, class_B, peak_C + sum_C.log(), _both_classes(class_B, ids_G.numel())


def _both_classes(class_B: Tensor, groups: int) -> Tensor:
    """Whether each group has rows of both classes, 2g and 2g + 1; (groups,) bool."""
    return torch.bincount(class_B, minlength=2 * groups).view(-1, 2).all(dim=1)
