"""The number of rollouts of each prompt in a step, spread so that many groups have a signal.

    signal of n rollouts at success rate p      g_p(n) = 1 − p^n − (1 − p)^n
    expected under p ~ Beta(a, b)               G(n) = 1 − B(a + n, b) / B(a, b) − B(a, b + n) / B(a, b)
    gain of one more rollout                    G(n + 1) − G(n) = E[p^n (1 − p) + (1 − p)^n p]

A group in which all rollouts fail, or all succeed, has advantage 0 and teaches nothing; g_p(n) is the probability that
a group is neither. At even odds a few rollouts are enough, where success or failure is rare it takes many, and where
one of them is certain none help. The numbers depend on earlier steps only, never on the rollouts that they count, so
for each prompt the expected gradient has the same direction for any n. This is ours, not in arXiv 2603.11321v1.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import count, islice


def gains(prior_success: float, prior_failure: float) -> Iterator[float]:
    """What the 2nd, 3rd, … rollout of a prompt adds to the expected signal: G(n + 1) − G(n) for n = 1, 2, …

    E[p^n] = B(a + n, b) / B(a, b) is the product of (a + i) / (a + b + i) over i < n, so neither a Beta function nor a
    difference of almost equal numbers is computed.

    Args:
        prior_success: a > 0 of the prompt's Beta prior.
        prior_failure: b > 0 of the prompt's Beta prior.
    """
    a, b = prior_success, prior_failure
    all_succeed = all_fail = 1.0
    for n in count(1):
        all_succeed *= (a + n - 1) / (a + b + n - 1)
        all_fail *= (b + n - 1) / (a + b + n - 1)
        yield all_succeed * (b / (a + b + n)) + all_fail * (a / (a + b + n))


def expected_signal(rollouts: int, *, prior_success: float, prior_failure: float) -> float:
    """Probability G(n) that of n rollouts of a prompt some succeed and some fail, in [0, 1).

    Args:
        rollouts: n ≥ 1.
        prior_success: a > 0 of the prompt's Beta prior.
        prior_failure: b > 0 of the prompt's Beta prior.
    """
    return math.fsum(islice(gains(prior_success, prior_failure), rollouts - 1))


def allocate(priors: Sequence[tuple[float, float]], *, total: int, least: int, most: int) -> list[int]:
    """The numbers of rollouts with the largest expected number of groups with a signal, Σ_i G_i(n_i).

    Every prompt gets `least`; then each further rollout goes to the prompt where it gains most, to the first one of
    several. No other choice with the same total and the same bounds has a larger sum:

    1. For each p the gain p^n (1 − p) + (1 − p)^n p does not increase with n, because p and 1 − p are at most 1. So
       g_p is concave in n, and so is its expectation G_i: the gains of a prompt come in decreasing order.
    2. Σ_i G_i(n_i) is a constant plus the sum of the gains that are taken, n_i − least of each prompt, and always the
       same number of them in all. It is at most the sum of the largest gains of all prompts, where each prompt offers
       its first most − least.
    3. The largest gain that is left is always the next one of some prompt, by 1. So the greedy choice takes exactly
       the largest gains, and reaches that bound.

    Args:
        priors: a > 0 and b > 0 of the Beta prior of each of P prompts.
        total: number of rollouts of all prompts, from P · least to P · most.
        least: smallest number of rollouts of a prompt, at least 1.
        most: largest number of rollouts of a prompt.

    Returns:
        P numbers. They depend on the arguments alone.

    Raises:
        ValueError: if the total does not lie within the bounds.
    """
    if not len(priors) * least <= total <= len(priors) * most:
        raise ValueError(f"{total} rollouts for {len(priors)} prompts with {least} to {most} rollouts each")
    rollouts = [least] * len(priors)
    if least == most:
        return rollouts
    further = [islice(gains(*prior), least - 1, None) for prior in priors]
    offers = [(-next(of), prompt) for prompt, of in enumerate(further)]
    heapq.heapify(offers)
    for _ in range(total - sum(rollouts)):
        _, prompt = offers[0]
        rollouts[prompt] += 1
        if rollouts[prompt] < most:
            heapq.heapreplace(offers, (-next(further[prompt]), prompt))
        else:
            heapq.heappop(offers)
    return rollouts
