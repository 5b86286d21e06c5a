"""The weight of demonstrations' tokens in a launch: turns the configuration into `DemonstrationShape`."""

from __future__ import annotations

import math

from hapo_verl.algo import teachability
from hapo_verl.algo.policy_loss import DemonstrationShape
from hapo_verl.config import HapoConfig


def judged_shape(hapo: HapoConfig) -> DemonstrationShape:
    """The shape that decides which tokens are untaught.

    It is the shape of `hapo.loss`; but an objective that weights likelihoods pushes every token by log π, with the
    weight 1, so that no token is untaught.
    """
    return DemonstrationShape("power", math.inf, 0.0) if hapo.objective.weighs_likelihood else demonstration_shape(hapo)


def demonstration_shape(hapo: HapoConfig) -> DemonstrationShape:
    """The shape that `hapo.loss` configures, with its λ and κ."""
    return DemonstrationShape(hapo.loss.shape, hapo.loss.shaping, hapo.loss.exponent)


def untaught_below(hapo: HapoConfig) -> float:
    """The log-probability (nats) below which tokens are untaught in this launch; −inf if every token is taught."""
    return teachability.untaught_below(judged_shape(hapo))
