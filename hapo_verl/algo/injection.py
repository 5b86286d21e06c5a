"""The choice of the rollout that a demonstration replaces: the worst one of the group.

The worst rollout is the one with the lowest score; among equals, a truncated one, then the longest, then a seeded
choice. Its prompt stays; its response, masks, score and length become those of the demonstration, and the group's
statistics are computed over the resulting rows. (Synthetic Success Injection, arXiv 2603.11321v1, section 4; the order
among equals is ours.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rollout:
    """What the gate and the injection need to know about a rollout.

    Attributes:
        score: reward of the rollout.
        success: its binary success, see `is_success`.
        truncated: whether it was cut off at `response_length`.
        length: number of response tokens.
    """

    score: float
    success: bool
    truncated: bool
    length: int


def worst_rollout(rollouts: Sequence[Rollout], rng: random.Random) -> int:
    """Index of the rollout that the demonstration replaces.

    Args:
        rollouts: the rollouts of the group, at least one.
        rng: generator for the choice among equals; drawn from exactly once.
    """

    def badness(rollout: Rollout) -> tuple[float, bool, int]:
        return -rollout.score, rollout.truncated, rollout.length

    worst = max(map(badness, rollouts))
    return rng.choice([i for i, rollout in enumerate(rollouts) if badness(rollout) == worst])


def is_success(score: float, accuracy: float | bool | None, threshold: float) -> bool:
    """Whether a rollout is a success: its accuracy, or its score if `accuracy` is None, is at least `threshold`.

    `accuracy` is the `acc` that a reward function may return beside the score.
    """
    return float(score if accuracy is None else accuracy) >= threshold
