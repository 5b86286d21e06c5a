"""How the help retracts: thresholds and budgets that fall, as functions of the step or of the policy's success.

    annealed    γ_t = γ₀ (1 − t/T)^k
    adaptive    γ_t = γ₀ min(1, (1 − x_t) / (1 − x_0)),   x_t running mean of the on-policy success
    budget      ε_t = ε₀ (1 − t/T)

With a constant γ the gate `paper` fires for ever wherever a group can be unlucky (probability .187 at a success rate of
.9, N = 8). A γ_t at or below a₀ / (a₀ + b₀ + N), the confidence after N failures, cannot fire at all: from that step on
the run is GRPO. These schedules are ours; the formula of arXiv 2603.11321v3 is not known to us.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace


def annealed(start: float, step: int, *, horizon: int, power: float = 1.0) -> float:
    """start · (1 − t/T)^k, and 0 from step T on.

    Args:
        start: value at step 0.
        step: t ≥ 0, updates done so far.
        horizon: T > 0.
        power: k > 0.
    """
    return start * max(0.0, 1.0 - step / horizon) ** power


def hard_off_step(
    threshold: float, *, horizon: int, power: float, rollouts: int, prior_success: float, prior_failure: float
) -> int:
    """First step from which `annealed` cannot fire, even after N failures: ⌈T (1 − (c₀/γ₀)^{1/k})⌉.

    c₀ = a₀ / (a₀ + b₀ + N) is the least confidence there is. Rounded up to the step, where a floating-point equality
    may fall on either side.

    Args:
        threshold: γ₀.
        horizon: T.
        power: k.
        rollouts: N.
        prior_success: a₀.
        prior_failure: b₀.
    """
    least = prior_success / (prior_success + prior_failure + rollouts)
    if threshold <= least:
        return 0
    return min(horizon, math.ceil(horizon * (1 - (least / threshold) ** (1 / power)) + 1e-9))


@dataclass(frozen=True)
class RunningSuccess:
    """x_0 and x_t: on-policy success of the first step and its running mean; None before the first."""

    first: float | None = None
    mean: float | None = None

    def after(self, success: float, memory: float) -> RunningSuccess:
        """The state after a step.

        Args:
            success: mean on-policy success of the step's rollouts.
            memory: share of the running mean that is kept, in [0, 1).
        """
        if self.mean is None:
            return RunningSuccess(success, success)
        return replace(self, mean=memory * self.mean + (1 - memory) * success)


def adaptive(start: float, running: RunningSuccess) -> float:
    """γ₀ min(1, (1 − x_t)/(1 − x_0)); γ₀ before the first step, 0 where the first step had no failure."""
    if running.first is None or running.mean is None:
        return start
    if running.first >= 1.0:
        return 0.0
    return start * min(1.0, (1.0 - running.mean) / (1.0 - running.first))


def admitted(prompts: int, share: float, *, submitted: int, rng: random.Random) -> list[bool]:
    """Which of a submission's prompts may be injected under a budget.

    The choice looks at no outcome, so it thins the gate's decisions independently of them; and of n prompts of a step
    never more than ⌊share · n⌋ are admitted, however the step is cut into submissions.

    Args:
        prompts: P, prompts of this submission.
        share: ε_t in [0, 1].
        submitted: prompts of this step submitted before.
        rng: source of the choice.
    """
    places = math.floor(share * (submitted + prompts)) - math.floor(share * submitted)
    chosen = set(rng.sample(range(prompts), places))
    return [prompt in chosen for prompt in range(prompts)]
