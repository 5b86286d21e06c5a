"""CHORD (arXiv 2508.11408): reinforcement and imitation in one step, each a mean over its own tokens.

    loss = (1 − μ) · mean over the policy's own tokens of GRPO's surrogate
           + μ · mean over the demonstrations' tokens of −φ(π) log π

No gradient flows through φ; CHORD-φ has φ = π(1 − π) and a constant μ = 0.1. The second mean has the gradient of the
demonstrations' term of `policy_loss.py` with the shape `chord` and an advantage that does not depend on the group.
Since that loss divides by all T tokens, this advantage is A = μ T / T_demonstrations, and the policy's own advantages
are multiplied by (1 − μ) T / T_own. We followed the published code (Trinity-RFT, `chord_policy_loss.py`). There the
demonstrations come from a separate data set; here they are those of the batch's prompts.

The token counts T are those of a whole step. If a step has several updates, each uses the step's proportions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hapo_verl.algo.objectives import Objective
from hapo_verl.config import checked, positive


@dataclass(frozen=True)
class Chord(Objective):
    """The objective CHORD; `imitation` is μ."""

    name: str = "chord"
    # mu: the share of imitation in the loss; GRPO has the rest.
    imitation: float = checked(
        0.1, lambda v: positive(v) and v < 1, "the share mu of imitation in the loss lies in (0, 1). Use 0.1."
    )
    aggregation: ClassVar[str | None] = "token-mean"

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor, tokens_B: Tensor) -> Tensor:
        total, of_demonstrations = int(tokens_B.sum()), int(tokens_B[demonstration_B].sum())
        # max(1, ...): a kind of row that is absent has no loss, so its divisor does not matter.
        imitated = self.imitation * total / max(1, of_demonstrations)
        own_B = advantage_B * ((1 - self.imitation) * total / max(1, total - of_demonstrations))
        return torch.where(demonstration_B, imitated, own_B)
