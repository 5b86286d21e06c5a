"""The gate: is the policy stuck on this prompt?

    c = (a + S) / (a + b + N)          posterior mean of Beta(a, b) after S successes in N rollouts
    inject  ⟺  c < γ  and  S < N

(arXiv 2603.11321v1, section 4, with a = b = 1 and γ = 0.8 in every step: the gate `paper`.) At N = 8 that fires for
S ≤ 6; S = 7 gives c = γ exactly and does not fire. Two floats would have to be equal for that, so the comparison is
made between integers: S against the largest success count that still fires.

The other gates are ours. `annealed`, `adaptive` and `posterior` are the same rule at another γ, a or b (`schedule.py`,
`posterior.py`); `thompson` draws θ ~ Beta(a + S, b + N − S) and compares the draw; `zero`, `never` and `always` look at
no posterior. Each is the probability of firing at every success count, so that all of them can be enumerated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Situation:
    """What the gate knows of a prompt before its rollouts are scored.

    Attributes:
        threshold: γ of this step, in [0, 1].
        prior_success: a > 0 of the prompt's Beta prior.
        prior_failure: b > 0 of the prompt's Beta prior.
        admitted: False where the step's budget is spent on other prompts; then nothing is injected.
    """

    threshold: float = 0.8
    prior_success: float = 1.0
    prior_failure: float = 1.0
    admitted: bool = True


def confidence(successes: int, rollouts: int, *, prior_success: float, prior_failure: float) -> float:
    """Posterior mean success rate c of a group, in (0, 1).

    Args:
        successes: S, successful on-policy rollouts of the group, 0 ≤ S ≤ N.
        rollouts: N, on-policy rollouts of the group.
        prior_success: a₀ > 0 of the Beta prior.
        prior_failure: b₀ > 0 of the Beta prior.
    """
    return (prior_success + successes) / (prior_success + prior_failure + rollouts)


def injection_bound(rollouts: int, *, threshold: float, prior_success: float, prior_failure: float) -> int:
    """The largest success count S for which the gate fires: ⌈γ(a₀ + b₀ + N) − a₀⌉ − 1, capped at N − 1.

    Numbers are taken as the decimals they are written as (0.8 is 4/5), so the result is exact. −1 means that the gate
    never fires; γ = 0 always gives −1.

    Args:
        rollouts: N ≥ 1.
        threshold: γ in [0, 1].
        prior_success: a₀ > 0.
        prior_failure: b₀ > 0.
    """
    gamma, a0, b0 = (Fraction(repr(float(x))) for x in (threshold, prior_success, prior_failure))
    below = math.ceil(gamma * (a0 + b0 + rollouts) - a0) - 1
    # A group in which all N succeed has no worst rollout to replace.
    return max(-1, min(below, rollouts - 1))


def thompson_probability(
    successes: int, rollouts: int, *, threshold: float, prior_success: float, prior_failure: float
) -> float:
    """P(θ < γ), θ ~ Beta(a + S, b + N − S): how often a Thompson draw fires after S successes in N rollouts.

    Args and ranges as for `injection_bound`.
    """
    from scipy.special import betainc

    return float(betainc(prior_success + successes, prior_failure + rollouts - successes, threshold))


def firing_probabilities(gate: str, rollouts: int, situation: Situation) -> list[float]:
    """P(fire | S) for S = 0 … N, the budget left aside; never rises with S.

    Args:
        gate: a name of `hapo_verl.config.GATES`.
        rollouts: N ≥ 1, on-policy rollouts of the group.
        situation: threshold and prior; not read by `zero`, `never` and `always`.
    """
    posterior = {
        "threshold": situation.threshold,
        "prior_success": situation.prior_success,
        "prior_failure": situation.prior_failure,
    }
    if gate == "thompson":
        # As in `paper`, a group in which all succeed is left alone.
        return [thompson_probability(s, rollouts, **posterior) for s in range(rollouts)] + [0.0]
    bound = {"zero": 0, "never": -1, "always": rollouts}.get(gate)
    if bound is None:
        bound = injection_bound(rollouts, **posterior)
    return [float(s <= bound) for s in range(rollouts + 1)]


def fires(probabilities: Sequence[float], successes: int, rng: random.Random) -> bool:
    """The decision at S successes; one number is drawn, whatever the gate.

    Args:
        probabilities: the result of `firing_probabilities`.
        successes: S.
        rng: the group's generator.
    """
    return rng.random() < probabilities[successes]


def expected_firing(success_rate: float, probabilities: Sequence[float]) -> float:
    """Σ_S P(S) P(fire | S), S ~ Binomial(N, p): how often the gate fires at true success rate p.

    Args:
        success_rate: p in [0, 1].
        probabilities: the result of `firing_probabilities`, N + 1 of them.
    """
    p, rollouts = success_rate, len(probabilities) - 1
    return math.fsum(
        math.comb(rollouts, s) * p**s * (1 - p) ** (rollouts - s) * fire for s, fire in enumerate(probabilities)
    )
