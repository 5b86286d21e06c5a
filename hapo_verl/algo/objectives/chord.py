"""CHORD (arXiv 2508.11408): reinforcement and imitation in one step, each a mean over its own tokens.

    loss = (1 − μ) · mean over the policy's own tokens of GRPO's surrogate
           + μ · mean over the demonstrations' tokens of −φ(π) log π

φ carries no gradient; CHORD-φ has φ = π(1 − π) and a constant μ = 0.1. The second mean is the demonstrations' term of
`policy_loss.py` with the shape `chord`, whose gradient it has, and an advantage that does not depend on the group:
since that loss divides by all T tokens, it is A = μ T / T_demonstrations, and the policy's own advantages are
multiplied by (1 − μ) T / T_own. Read in its published code (Trinity-RFT, `chord_policy_loss.py`), where the
demonstrations come from a data set of their own; here they are those of the prompts at hand.

The T are those of a step; where it is several updates, each is CHORD's with the step's proportions.
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
    """μ is `imitation`."""

    name: str = "chord"
    # mu: the share of imitation in the loss; GRPO has the rest.
    imitation: float = checked(
        0.1, lambda v: positive(v) and v < 1, "the share mu of imitation in the loss lies in (0, 1). Use 0.1."
    )
    aggregation: ClassVar[str | None] = "token-mean"

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor, tokens_B: Tensor) -> Tensor:
        total, of_demonstrations = int(tokens_B.sum()), int(tokens_B[demonstration_B].sum())
        # A kind of row that is absent has no loss, whatever it would be divided by.
        imitated = self.imitation * total / max(1, of_demonstrations)
        own_B = advantage_B * ((1 - self.imitation) * total / max(1, total - of_demonstrations))
        return torch.where(demonstration_B, imitated, own_B)
