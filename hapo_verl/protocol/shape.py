"""How a launch weighs the tokens of its demonstrations, as `hapo_verl.algo` asks for it."""

from __future__ import annotations

import math

from hapo_verl.algo import teachability
from hapo_verl.algo.policy_loss import DemonstrationShape
from hapo_verl.config import HapoConfig


def judged_shape(hapo: HapoConfig) -> DemonstrationShape:
    """What weighs a demonstration's tokens; an objective that weighs likelihoods pushes all of them, by log π."""
    return DemonstrationShape("power", math.inf, 0.0) if hapo.objective.weighs_likelihood else demonstration_shape(hapo)


def demonstration_shape(hapo: HapoConfig) -> DemonstrationShape:
    """`hapo.loss.shape`, with its λ and κ."""
    return DemonstrationShape(hapo.loss.shape, hapo.loss.shaping, hapo.loss.exponent)


def untaught_below(hapo: HapoConfig) -> float:
    """log π below which a launch leaves tokens untaught, nats; −inf where it teaches all."""
    return teachability.untaught_below(judged_shape(hapo))
