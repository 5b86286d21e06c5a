"""Schedules that reduce injection over a run: thresholds and budgets that fall with the step or with success.

    annealed    γ_t = γ₀ (1 − t/T)^k
    adaptive    γ_t = γ₀ min(1, (1 − x_t) / (1 − x_0)),   x_t running mean of the on-policy success
    budget      ε_t = ε₀ (1 − t/T)

With a constant γ the gate `paper` never stops firing while groups can fail by chance (probability .187 at a success
rate of .9, N = 8). Once γ_t is at or below a₀ / (a₀ + b₀ + N), the confidence after N failures, the gate cannot fire at
all: from that step on the run is GRPO. These schedules are ours; we do not know the formula of arXiv 2603.11321v3.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace


def annealed(start: float, step: int, *, horizon: int, power: float = 1.0) -> float:
    """The value start · (1 − t/T)^k at step t, and 0 from step T on.

    Args:
        start: value at step 0.
        step: t ≥ 0, number of updates done so far.
        horizon: T > 0.
        power: k > 0.
    """
    return start * max(0.0, 1.0 - step / horizon) ** power


def hard_off_step(
    threshold: float, *, horizon: int, power: float, rollouts: int, prior_success: float, prior_failure: float
) -> int:
    """The first step at which the gate `annealed` cannot fire, even after N failures: ⌈T (1 − (c₀/γ₀)^{1/k})⌉.

    c₀ = a₀ / (a₀ + b₀ + N) is the lowest possible confidence. If the formula gives a whole number, the result may be
    one step later, so that rounding errors of floats cannot let the gate fire.

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
    """On-policy success of the first step (x_0) and its running mean (x_t); None before the first step."""

    first: float | None = None
    mean: float | None = None

    def after(self, success: float, memory: float) -> RunningSuccess:
        """The state after one more step.

        Args:
            success: mean on-policy success of the step's rollouts.
            memory: share of the running mean that a step keeps, in [0, 1).
        """
        if self.mean is None:
            return RunningSuccess(success, success)
        return replace(self, mean=memory * self.mean + (1 - memory) * success)


def adaptive(start: float, running: RunningSuccess) -> float:
    """The threshold γ₀ min(1, (1 − x_t)/(1 − x_0)); γ₀ before the first step, 0 if the first step had no failure."""
    if running.first is None or running.mean is None:
        return start
    if running.first >= 1.0:
        return 0.0
    return start * min(1.0, (1.0 - running.mean) / (1.0 - running.first))


def admitted(prompts: int, share: float, *, submitted: int, rng: random.Random) -> list[bool]:
    """Choose at random which prompts of a submission may get a demonstration under a budget.

    The choice does not look at outcomes, so it is independent of the gate's decisions. At most ⌊share · n⌋ of a step's
    n prompts are admitted, no matter how the step is split into submissions.

    Args:
        prompts: P, number of prompts in this submission.
        share: ε_t in [0, 1].
        submitted: number of prompts submitted earlier in this step.
        rng: generator of the choice.

    Returns:
        P booleans, True for admitted prompts.
    """
    places = math.floor(share * (submitted + prompts)) - math.floor(share * submitted)
    chosen = set(rng.sample(range(prompts), places))
    return [prompt in chosen for prompt in range(prompts)]
