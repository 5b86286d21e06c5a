"""The objectives: PPO's clipped surrogate, a weighted log-likelihood, or both. One file per method.

Every method is described by two numbers per row: an advantage A, computed once per step, for the policy loss
(`policy_loss.py`), and a weight W of the row's log-likelihood, computed before every optimizer step:

    loss = policy loss of A  −  agg(W · log π)

The base class `Objective` is the surrogate alone (W = 0). GRPO, LUFFY, DAPO and HAPO use it; they differ only in gate,
injection and clip. A method that weights likelihoods lists in `reads` what it needs from the policy in training. No
gradient flows through the weights. To add a method, add a file here with a subclass, a preset, and a test.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """The rows of one optimizer step, over all ranks.

    Attributes:
        score_B: (B,) rewards.
        group_B: (B,) int64 id of each row's prompt.
        demonstration_B: (B,) bool, True on demonstrations.
        tokens_B: (B,) number of tokens that train, > 0.
        log_ratio_B: (B,) mean over those tokens of log π − log π_old, nats; 0 if the method does not read it.
        entropy_B: (B,) mean entropy of the policy over those tokens, nats; 0 if the method does not read it.
        batch_size: divisor of the `seq-mean-*` aggregations: B plus the rows that were left out because no token of
            theirs trains or their gradient is 0.
        groups: number of prompts of the whole step, including prompts without any row here.
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
        reads: what the method needs from the policy in training, `log_ratio` or `entropy`. Empty: the method weights
            no likelihoods.
        whole_groups: whether every optimizer step must contain whole groups.
        binary_scores: whether rewards must be 0 or 1.
        aggregation: the only `loss_agg_mode` with which the loss is that of the method; None: any.
        idle_rows: whether some rows can have zero gradient; False: every row always has a gradient.
    """

    name: str = "surrogate"
    reads: ClassVar[frozenset[str]] = frozenset()
    whole_groups: ClassVar[bool] = False
    binary_scores: ClassVar[bool] = False
    aggregation: ClassVar[str | None] = None
    idle_rows: ClassVar[bool] = True

    @property
    def weighs_likelihood(self) -> bool:
        """Whether the method weights likelihoods, so that `likelihood_weight` is called."""
        return bool(self.reads)

    def advantage(self, advantage_B: Tensor, demonstration_B: Tensor, tokens_B: Tensor) -> Tensor:
        """The advantage A of each row, (B,), from the group-relative advantage; the base class returns it unchanged.

        Args:
            advantage_B: (B,) group-relative advantages.
            demonstration_B: (B,) bool, True on demonstrations.
            tokens_B: (B,) number of tokens that train.
        """
        return advantage_B

    def has_gradient(self, advantage_B: Tensor, score_B: Tensor, group_B: Tensor) -> Tensor:
        """The rows that move the policy, (B,) bool; the contribution of other rows to the gradient is exactly 0.

        The answer needs no pass through the model. It holds for this method alone: a KL term or an entropy bonus gives
        every row a gradient. In the base class every term of a row is multiplied by A.

        Args:
            advantage_B: (B,) the result of `advantage`.
            score_B: (B,) rewards.
            group_B: (B,) int64 id of each row's prompt.
        """
        return advantage_B != 0

    def likelihood_weight(self, rows: Rows) -> Tensor:
        """The weight W of each row's log-likelihood, (B,)."""
        raise NotImplementedError(f"{self.name} weighs no likelihood")

    def loss(self, rows: Rows) -> Tensor | None:
        """The value of the method's own loss, a scalar, for logging; None if it has none beside the weighted terms."""
        return None


def objectives() -> dict[str, Objective]:
    """All methods of this folder with their defaults, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {method.name: method for method in (Objective(), *(of() for of in Objective.__subclasses__()))}
