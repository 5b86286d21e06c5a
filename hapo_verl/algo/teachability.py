"""Which tokens of a demonstration its loss leaves untaught, and how improbable the least likely ones are.

A token of probability q is pushed by the weight w(q) = ∂F/∂log π of `policy_loss.py`. It is *untaught* where

    w(q) < 0.01 · max w    and    q lies below the maximum,

that is, where the policy would not write it and the loss hardly changes that. A token that the policy writes anyway
needs no push and is never untaught, however small its weight. Every w rises up to its maximum, so a shape has one bound
below which all tokens are untaught: q = 2.5e-4 for the paper's loss, none for its logarithm.

One untaught token that the reward asks for is enough, and the demonstration is never written: so what counts of a
demonstration is its least likely token. Quantiles of a batch cannot be had from those of its parts, so the parts add up
a histogram: `BINS_A_DECADE` bins of equal width in log₁₀ q, down to 10^−`DECADES` and one for all below. A quantile is
exact to within a bin, a factor of 1.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hapo_verl.algo.policy_loss import DemonstrationShape

# Of the largest weight: with less a token is untaught.
LEAST_WEIGHT = 0.01
DECADES, BINS_A_DECADE = 12, 4
BINS = 1 + DECADES * BINS_A_DECADE
# What is counted of a batch, in this order; then come the bins, the least likely first.
COUNTS = ("tokens", "untaught_tokens", "demonstrations", "demonstrations_with_untaught_token")
COUNTED = len(COUNTS) + BINS


def untaught_below(shape: DemonstrationShape) -> float:
    """log q below which tokens are untaught, nats; −inf where every token is taught."""
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
    # w = r^κ / (1 + r)^(κ + 1) with r = q/λ. Far below the maximum r is small, and this converges to a digit a round.
    log_r = -math.inf
    for _ in range(64):
        log_r = (math.log(least) + (kappa + 1) * math.log1p(math.exp(log_r))) / kappa
    return log_r + math.log(shape.shaping)


def count(logp_BT: Tensor, mask_BT: Tensor, demonstration_B: Tensor, *, untaught_below: float) -> Tensor:
    """What adds up over the parts of a batch: `COUNTS` and the bins of each demonstration's least likely token.

    Args:
        logp_BT: (B, T) log-probabilities of the rows' tokens under the policy, nats; any value outside of the mask.
        mask_BT: (B, T) bool, the tokens that train. A row without one is not counted.
        demonstration_B: (B,) bool.
        untaught_below: see `untaught_below`, nats.

    Returns:
        (COUNTED,) fp64.
    """
    counted_BT = mask_BT & demonstration_B[:, None]
    counted_B = counted_BT.any(1)
    untaught_BT = counted_BT & (logp_BT < untaught_below)
    least_D = torch.where(counted_BT, logp_BT, torch.inf).amin(1)[counted_B]
    bin_D = (least_D.double() * (BINS_A_DECADE / math.log(10)) + BINS).floor().clamp(0, BINS - 1)
    counts = [counted_BT.sum(), untaught_BT.sum(), counted_B.sum(), untaught_BT.any(1).sum()]
    return torch.cat([torch.stack(counts).double(), torch.bincount(bin_D.long(), minlength=BINS).double()])


def describe(counts: Sequence[float]) -> dict[str, float]:
    """Of the counts of a batch, or any multiple of them: shares in [0, 1] and probabilities; nothing of no row.

    untaught_tokens            of the demonstrations' tokens
    with_untaught_token        of the demonstrations
    least_probability_median   of the least likely token of a demonstration, over demonstrations
    least_probability_q05      its 5 % quantile
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
    """The probability below which this share of the rows lies, as if each bin were evenly filled in log₁₀ q."""
    missing = share * sum(bins)
    for number, rows in enumerate(bins):
        if rows and missing <= rows:
            within = missing / rows if number else 1.0
            return 10 ** ((number - 1 + within) / BINS_A_DECADE - DECADES)
        missing -= rows
    return 1.0
