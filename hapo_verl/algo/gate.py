"""The gate: decides for each group whether the policy needs a demonstration for this prompt.

    c = (a + S) / (a + b + N)          posterior mean of Beta(a, b) after S successes in N rollouts
    inject  ⟺  c < γ  and  S < N

This is the gate `paper` (arXiv 2603.11321v1, section 4), with a = b = 1 and γ = 0.8 in every step. At N = 8 it fires
for S ≤ 6; S = 7 gives c = γ exactly and does not fire. A comparison of floats could get this case wrong, so integers
are compared: S with the largest success count that still fires.

The other gates are ours. `annealed`, `adaptive` and `posterior` are the same rule with another γ, a or b
(`schedule.py`, `posterior.py`). `thompson` draws θ ~ Beta(a + S, b + N − S) and fires if θ < γ. `zero`, `never` and
`always` use no posterior. Every gate is a list of firing probabilities, one for each success count.
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
        admitted: False if the budget of the step leaves this prompt out; then nothing is injected.
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

    Arguments are read as the decimals they print as (0.8 is 4/5), so the result is exact. −1 means that the gate never
    fires; γ = 0 always gives −1.

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
    """Probability that a Thompson draw fires after S successes in N rollouts: P(θ < γ), θ ~ Beta(a + S, b + N − S).

    The other arguments and their ranges are those of `injection_bound`.
    """
    from scipy.special import betainc

    return float(betainc(prior_success + successes, prior_failure + rollouts - successes, threshold))


def firing_probabilities(gate: str, rollouts: int, situation: Situation) -> list[float]:
    """The probabilities of firing, P(fire | S) for S = 0 … N, before the budget; they never increase with S.

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
        # As in `paper`, a group in which every rollout succeeds gets no demonstration.
        return [thompson_probability(s, rollouts, **posterior) for s in range(rollouts)] + [0.0]
    bound = {"zero": 0, "never": -1, "always": rollouts}.get(gate)
    if bound is None:
        bound = injection_bound(rollouts, **posterior)
    return [float(s <= bound) for s in range(rollouts + 1)]


def fires(probabilities: Sequence[float], successes: int, rng: random.Random) -> bool:
    """Decide whether the gate fires after S successes; draws exactly one random number for every gate.

    Args:
        probabilities: the result of `firing_probabilities`.
        successes: S.
        rng: the group's generator.
    """
    return rng.random() < probabilities[successes]


def expected_firing(success_rate: float, probabilities: Sequence[float]) -> float:
    """Probability that the gate fires at true success rate p: Σ_S P(S) P(fire | S), S ~ Binomial(N, p).

    Args:
        success_rate: p in [0, 1].
        probabilities: the result of `firing_probabilities`, N + 1 numbers.
    """
    p, rollouts = success_rate, len(probabilities) - 1
    return math.fsum(
        math.comb(rollouts, s) * p**s * (1 - p) ** (rollouts - s) * fire for s, fire in enumerate(probabilities)
    )
