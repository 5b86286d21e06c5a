"""What is maximised: PPO's clipped surrogate of an advantage, or a weighted log-likelihood; a file a method.

Every method of the comparison is a pair: an advantage A of each row, computed once a step, for the policy loss
(`policy_loss.py`), and a weight W of each row's log-likelihood, computed in front of every optimizer step:

    loss = policy loss of A  −  agg(W · log π)

`Objective` itself is the surrogate alone: GRPO, LUFFY, DAPO and HAPO, which differ in gate, injection and clip only. A
method that weighs likelihoods says what it `reads` of the policy in training; its weights carry no gradient. A new
method is a file here with a subclass, a preset, and a test.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The rows of one optimizer step, on all ranks.

    Attributes:
        score_B: (B,) rewards.
        group_B: (B,) int64 id of each row's prompt.
        demonstration_B: (B,) bool.
        tokens_B: (B,) tokens that train, > 0.
        log_ratio_B: (B,) mean over those tokens of log π − log π_old, nats; 0 where it is not read.
        entropy_B: (B,) mean entropy of the policy over those tokens, nats; 0 where it is not read.
        batch_size: what the `seq-mean-*` aggregations divide by; B, the rows without a token that trains, and those
            left out because their weight is 0 (`Objective.trains`).
        groups: of the step, those left out among them; None: those of `group_B`.
    """

    score_B: Tensor
    group_B: Tensor
    demonstration_B: Tensor
    tokens_B: Tensor
    log_ratio_B: Tensor
    entropy_B: Tensor
    batch_size: int
    groups: int | None = None


@dataclass(frozen=True)
class Objective:
    """PPO's clipped surrogate; the base of the others.

    Attributes:
        reads: fields of `Rows` for which the policy in training is asked; none: no likelihood is weighed.
        whole_groups: every optimizer step has to see whole groups.
        binary_scores: rewards must be 0 or 1.
        every_row_trains: whatever its advantage.
        aggregation: the only `loss_agg_mode` in which the loss is the method's; None: any.
    """

    name: str = "surrogate"
    reads: ClassVar[frozenset[str]] = frozenset()
    whole_groups: ClassVar[bool] = False
    binary_scores: ClassVar[bool] = False
    every_row_trains: ClassVar[bool] = False
    aggregation: ClassVar[str | None] = None

    @property
    def weighs_likelihood(self) -> bool:
        """Whether `likelihood_weight` is to be asked."""
        return bool(self.reads)

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor) -> Tensor:
        """A of each row, (B,), from the group-relative one."""
        return advantage_B

    def trains(self, score_B: Tensor, group_B: Tensor, advantage_B: Tensor) -> Tensor:
        """Which rows can move the policy, (B,) bool: the loss of the others and its gradient are exactly 0.

        A KL term or an entropy bonus beside the objective moves the policy with every row.

        Args:
            score_B: (B,) rewards of rows with a token that trains.
            group_B: (B,) int64 id of each row's prompt.
            advantage_B: (B,) A, as `advantage` leaves it.
        """
        return torch.ones_like(advantage_B, dtype=torch.bool) if self.every_row_trains else advantage_B != 0

    def likelihood_weight(self, rows: Rows) -> Tensor:
        """W of each row, (B,)."""
        raise NotImplementedError(f"{self.name} weighs no likelihood")

    def loss(self, rows: Rows) -> Tensor | None:
        """The method's own loss, a scalar, where its gradient is what the weights give; for the log."""
        return None


def objectives() -> dict[str, Objective]:
    """Every method of this folder with its defaults, by its name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {method.name: method for method in (Objective(), *(of() for of in Objective.__subclasses__()))}
