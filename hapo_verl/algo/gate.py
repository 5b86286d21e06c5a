"""The gate: is the policy stuck on this prompt?

    c = (a₀ + S) / (a₀ + b₀ + N)          posterior mean of Beta(a₀, b₀) after S successes in N rollouts
    inject  ⟺  c < γ  and  S < N

(arXiv 2603.11321v1, section 4). With a₀ = b₀ = 1, γ = 0.8 and N = 8 it fires for S ≤ 6; S = 7 gives c = γ exactly and
does not fire. Two floats would have to be equal for that, so the comparison is made between integers: S against the
largest success count that still fires.
"""

from __future__ import annotations

import math
from fractions import Fraction


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


def firing_probability(success_rate: float, rollouts: int, bound: int) -> float:
    """P(S ≤ bound) for S ~ Binomial(N, p): how often the gate fires at true success rate p.

    Args:
        success_rate: p in [0, 1].
        rollouts: N ≥ 1.
        bound: the result of `injection_bound`; −1 gives 0.
    """
    p = success_rate
    return math.fsum(math.comb(rollouts, s) * p**s * (1 - p) ** (rollouts - s) for s in range(bound + 1))
