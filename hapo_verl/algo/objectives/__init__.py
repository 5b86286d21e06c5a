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
        batch_size: what the `seq-mean-*` aggregations divide by; B and the rows that are not among these, for they have
            no token that trains, or no gradient.
        groups: prompts of the whole step, those included of which no row is among these.
    """

    score_B: Tensor
    group_B: Tensor
    demonstration_B: Tensor
    tokens_B: Tensor
    log_ratio_B: Tensor
    entropy_B: Tensor
    batch_size: int
    groups: int


@dataclass(frozen=True)
class Objective:
    """PPO's clipped surrogate; the base of the others.

    Attributes:
        reads: fields of `Rows` for which the policy in training is asked; none: no likelihood is weighed.
        whole_groups: every optimizer step has to see whole groups.
        binary_scores: rewards must be 0 or 1.
        aggregation: the only `loss_agg_mode` in which the loss is the method's; None: any.
        idle_rows: a row may have no gradient; False: every row always has one.
    """

    name: str = "surrogate"
    reads: ClassVar[frozenset[str]] = frozenset()
    whole_groups: ClassVar[bool] = False
    binary_scores: ClassVar[bool] = False
    aggregation: ClassVar[str | None] = None
    idle_rows: ClassVar[bool] = True

    @property
    def weighs_likelihood(self) -> bool:
        """Whether `likelihood_weight` is to be asked."""
        return bool(self.reads)

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor) -> Tensor:
        """A of each row, (B,), from the group-relative one."""
        return advantage_B

    def has_gradient(self, advantage_B: Tensor, score_B: Tensor, group_B: Tensor) -> Tensor:
        """Which rows move the policy, (B,) bool; what the others contribute to the gradient is exactly 0.

        Known before any pass through the model, and of this method alone: a KL term or an entropy bonus beside it moves
        every row. A ratio, clipped or not, and its importance weight are multiplied by A, and so is a demonstration's
        shaped term.

        Args:
            advantage_B: (B,) what `advantage` gave.
            score_B: (B,) rewards.
            group_B: (B,) int64 id of each row's prompt.
        """
        return advantage_B != 0

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
