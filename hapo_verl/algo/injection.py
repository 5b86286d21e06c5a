"""Whom the demonstration replaces: the group's worst rollout.

The lowest score; among equals a truncated rollout first, then the longest, then a seeded choice. Its prompt stays; its
response, masks, score and length become the demonstration's, and the group's statistics are taken over the rows that
result. (Synthetic Success Injection, arXiv 2603.11321v1, section 4; the order among equals is ours.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hapo_verl.algo.gate import Situation, fires, firing_probabilities


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


@dataclass(frozen=True)
class Judgement:
    """What the gate says of a group.

    Attributes:
        gated: every rollout has a score, so that there was something to judge.
        successes: S.
        fired: the gate wants a demonstration.
        admitted: the budget has room for it.
        worst: position of the rollout that the demonstration replaces; None where it is to replace none.
    """

    gated: bool
    successes: int = 0
    fired: bool = False
    admitted: bool = True
    worst: int | None = None

    def moved(self, by: int) -> Judgement:
        """Of a group that begins at this row of a batch."""
        return self if self.worst is None else replace(self, worst=self.worst + by)


def judge(rollouts: Sequence[Rollout], situation: Situation, *, gate: str, rng: random.Random) -> Judgement:
    """The gate's decision on a group, and whom it would replace.

    Args:
        rollouts: the group, at least two of them; a score that is NaN leaves it unjudged.
        situation: what the gate knows of the prompt.
        gate: a name of `hapo_verl.config.GATES`.
        rng: the group's generator.
    """
    if any(math.isnan(rollout.score) for rollout in rollouts):
        return Judgement(gated=False)
    successes = sum(rollout.success for rollout in rollouts)
    fired = fires(firing_probabilities(gate, len(rollouts), situation), successes, rng)
    worst = worst_rollout(rollouts, rng) if fired and situation.admitted else None
    return Judgement(True, successes, fired, situation.admitted, worst)
