"""Counts the tokens of demonstrations that the loss cannot teach, and measures how improbable they are.

The loss pushes a token of probability q by the weight w(q) = ∂F/∂log π of `policy_loss.py`. A token is *untaught* if

    w(q) < 0.01 · max w    and    q lies below the q at which w is largest,

that is, the policy would not write the token and the loss hardly changes that. A token that the policy writes anyway
needs no push and is never untaught, even if its weight is small. Every w rises up to its maximum, so a shape has one
bound below which all tokens are untaught: q = 2.5e-4 for the paper's loss, none for its logarithm.

If the reward needs a token that is untaught, the policy never learns the demonstration. So a demonstration is
characterised by its least likely token. Quantiles over a batch cannot be computed from the quantiles of its parts, so
the parts add up a histogram instead: `BINS_A_DECADE` bins of equal width in log₁₀ q per decade down to 10^−`DECADES`,
and one bin for everything below. A quantile is exact to within one bin, a factor of 1.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hapo_verl.algo.policy_loss import DemonstrationShape

# A token with less than this share of the largest weight is untaught.
LEAST_WEIGHT = 0.01
DECADES, BINS_A_DECADE = 12, 4
BINS = 1 + DECADES * BINS_A_DECADE
# The counts of a batch, in this order; the bins of the histogram follow, lowest probabilities first.
COUNTS = ("tokens", "untaught_tokens", "demonstrations", "demonstrations_with_untaught_token")
COUNTED = len(COUNTS) + BINS


def untaught_below(shape: DemonstrationShape) -> float:
    """The log-probability (nats) below which tokens are untaught; −inf if every token is taught."""
    least = LEAST_WEIGHT * shape.largest_weight
    if shape.name == "trsft":
        return math.log(least * shape.shaping)
    if shape.name == "chord":
        # q (1 − q) = least
        return math.log((1 - math.sqrt(1 - 4 * least)) / 2)
    kappa = shape.exponent
    if kappa == 0:
        return -math.inf
    if shape.shaping == math.inf:
        return math.log(least) / kappa
    # Solves w = r^κ / (1 + r)^(κ + 1) for r = q/λ. Far below the maximum r is small, so each round gains about a digit.
    log_r = -math.inf
    for _ in range(64):
        log_r = (math.log(least) + (kappa + 1) * math.log1p(math.exp(log_r))) / kappa
    return log_r + math.log(shape.shaping)


def count(logp_BT: Tensor, mask_BT: Tensor, demonstration_B: Tensor, *, untaught_below: float) -> Tensor:
    """Count untaught tokens, and bin each demonstration by its least likely token; parts of a batch can be summed.

    Args:
        logp_BT: (B, T) log-probabilities of the rows' tokens under the policy, nats; any value outside the mask.
        mask_BT: (B, T) bool, True on the tokens that train. A row without any is not counted.
        demonstration_B: (B,) bool, True on demonstrations; other rows are not counted.
        untaught_below: the result of the function `untaught_below`, nats.

    Returns:
        (COUNTED,) fp64: `COUNTS`, then the bins.
    """
    counted_BT = mask_BT & demonstration_B[:, None]
    counted_B = counted_BT.any(1)
    untaught_BT = counted_BT & (logp_BT < untaught_below)
    least_D = torch.where(counted_BT, logp_BT, torch.inf).amin(1)[counted_B]
    bin_D = (least_D.double() * (BINS_A_DECADE / math.log(10)) + BINS).floor().clamp(0, BINS - 1)
    counts = [counted_BT.sum(), untaught_BT.sum(), counted_B.sum(), untaught_BT.any(1).sum()]
    return torch.cat([torch.stack(counts).double(), torch.bincount(bin_D.long(), minlength=BINS).double()])


def describe(counts: Sequence[float]) -> dict[str, float]:
    """Turn the counts of a batch into metrics; a common factor of all counts does not matter.

    untaught_tokens            share of the demonstrations' tokens that are untaught
    with_untaught_token        share of the demonstrations with at least one untaught token
    least_probability_median   probability of a demonstration's least likely token, median over demonstrations
    least_probability_q05      the same, 5 % quantile

    The result is empty if no demonstration was counted.
    """
    tokens, untaught, demonstrations, with_untaught = counts[: len(COUNTS)]
    if not demonstrations:
        return {}
    bins = counts[len(COUNTS) :]
    return {
        "untaught_tokens": untaught / tokens,
        "with_untaught_token": with_untaught / demonstrations,
        "least_probability_median": _quantile(bins, 0.5),
        "least_probability_q05": _quantile(bins, 0.05),
    }


def _quantile(bins: Sequence[float], share: float) -> float:
    """The probability below which this share of the rows lies, if each bin is filled evenly in log₁₀ q."""
    missing = share * sum(bins)
    for number, rows in enumerate(bins):
        if rows and missing <= rows:
            within = missing / rows if number else 1.0
            return 10 ** ((number - 1 + within) / BINS_A_DECADE - DECADES)
        missing -= rows
    return 1.0
