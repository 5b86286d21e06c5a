"""Whom the demonstration replaces: the group's worst rollout.

The lowest score; among equals a truncated rollout first, then the longest, then a seeded choice. Its prompt stays; its
response, masks, score and length become the demonstration's, and the group's statistics are taken over the rows that
result. (Synthetic Success Injection, arXiv 2603.11321v1, section 4; the order among equals is ours.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rollout:
    """What the gate and the injection look at.

    Attributes:
        score: the run's reward of the rollout.
        success: its binary success.
        truncated: it ran into `response_length`.
        length: response tokens.
    """

    score: float
    success: bool
    truncated: bool
    length: int


def worst_rollout(rollouts: Sequence[Rollout], rng: random.Random) -> int:
    """Index of the rollout that the demonstration replaces.

    Args:
        rollouts: the group, at least one.
        rng: source of the last choice among equals; drawn from once.
    """

    def badness(rollout: Rollout) -> tuple[float, bool, int]:
        return -rollout.score, rollout.truncated, rollout.length

    worst = max(map(badness, rollouts))
    return rng.choice([i for i, rollout in enumerate(rollouts) if badness(rollout) == worst])


def is_success(score: float, accuracy: float | bool | None, threshold: float) -> bool:
    """Binary success: `acc` where the reward function returns one, else the score, is at least `threshold`."""
    return float(score if accuracy is None else accuracy) >= threshold
