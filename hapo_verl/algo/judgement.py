"""Applies the gate to a whole batch of groups: which groups get a demonstration, which rollout it replaces, metrics.

For trainers that hold a whole batch of scored completions at once. Group g is the rows g·N … (g + 1)·N − 1.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hapo_verl.algo.demonstration import REASONS
from hapo_verl.algo.gate import Situation, fires, firing_probabilities
from hapo_verl.algo.injection import Rollout, worst_rollout


@dataclass(frozen=True)
class Judgement:
    """The gate's decision on one group.

    Attributes:
        gated: whether the gate was applied; False if a rollout has no score.
        successes: S.
        fired: whether the gate fired, that is, wants a demonstration.
        admitted: whether the budget allows one.
        worst: row of the batch that the demonstration replaces; None unless the gate fired and the budget allows it.
    """

    gated: bool
    successes: int = 0
    fired: bool = False
    admitted: bool = True
    worst: int | None = None


def judged(
    rollouts: Sequence[Rollout], per_group: int, situations: Sequence[Situation], *, gate: str, seed: str
) -> list[Judgement]:
    """The gate's decision on each group, and the rollout that a demonstration would replace.

    Args:
        rollouts: B rows. The gate is not applied to a group with a NaN score.
        per_group: N ≥ 2, a divisor of B.
        situations: what the gate knows of each of the B / N prompts.
        gate: a name of `hapo_verl.config.GATES`.
        seed: seed of this batch; each group's generator is seeded with it and the group's number.
    """
    judgements = []
    for number, situation in enumerate(situations):
        start = number * per_group
        group, rng = rollouts[start : start + per_group], random.Random(f"{seed}/{number}")
        if any(math.isnan(rollout.score) for rollout in group):
            judgements.append(Judgement(gated=False))
            continue
        successes = sum(rollout.success for rollout in group)
        fired = fires(firing_probabilities(gate, per_group, situation), successes, rng)
        worst = start + worst_rollout(group, rng) if fired and situation.admitted else None
        judgements.append(Judgement(True, successes, fired, situation.admitted, worst))
    return judgements


def described(
    judgements: Sequence[Judgement],
    per_group: int,
    *,
    injected: int,
    reasons: Sequence[str],
    threshold: float,
    reward: float,
) -> dict[str, float]:
    """The gate's metrics for a batch, shares in [0, 1], under the same names as in a verl run.

    Args:
        judgements: the decisions on the batch's groups, at least one.
        per_group: N.
        injected: number of groups that got a demonstration.
        reasons: one of `REASONS` for each demonstration that was wanted but not used.
        threshold: the gate's threshold in this step.
        reward: mean reward of the policy's own rows, before the injection.
    """
    gated, groups, refused = (
        [judgement for judgement in judgements if judgement.gated],
        len(judgements),
        Counter(reasons),
    )
    return {
        "hapo/gate/firing_rate": sum(judgement.fired for judgement in gated) / max(1, len(gated)),
        "hapo/gate/threshold": threshold,
        "hapo/gate/not_admitted": sum(j.fired and not j.admitted for j in gated) / groups,
        "hapo/gate/not_gated": 1 - len(gated) / groups,
        "hapo/injected/group_share": injected / groups,
        "hapo/on_policy_success": sum(j.successes for j in gated) / max(1, len(gated) * per_group),
        "hapo/on_policy_reward": reward,
        **{f"hapo/refused/{reason}": refused[reason] / groups for reason in REASONS},
    }
