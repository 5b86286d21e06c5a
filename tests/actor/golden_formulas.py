"""The loss of every preset written directly from its paper, in fp64, without any import from the product.

    A      (r − mean)/(std + 1e-6), or r − mean without the division, over the rows that the method compares
    ℓ      PPO's clipped surrogate with the dual clip at 3; without clipping −A ρ
    f(π)   π/(π + 0.1), LUFFY's shaping of a demonstration's tokens; HAPO+ uses the logarithm of π/(π + 1)

A formula takes groups of rollouts with a demonstration for each group, and returns the loss and the rows in it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

# Tokens of the longest response that a run allows.
LIMIT = 12


@dataclass(frozen=True)
class Row:
    """A row of the loss, with only the tokens that train."""

    place: tuple[int, int, bool]
    reward: float
    truncated: bool
    # Length of the response, including tool tokens.
    length: int
    policy: Tensor
    old: Tensor
    entropy: Tensor

    @property
    def demonstration(self) -> bool:
        return self.place[2]


Group = list[Row]


def paper_gate(group: Group) -> bool:
    """The paper's gate: fires if the posterior mean of Beta(1, 1) is below 0.8; at N = 8, up to 6 successes."""
    return Fraction(1 + sum(row.reward == 1 for row in group), 2 + len(group)) < Fraction(4, 5)


def replaced(group: Group, demonstration: Row) -> Group:
    """Replace the worst rollout by the demonstration: the one with the lowest reward, then truncated, then longest."""
    worst = min(group, key=lambda row: (row.reward, not row.truncated, -row.length))
    return [demonstration_at(demonstration, row.place[1]) if row is worst else row for row in group]


def appended(group: Group, demonstration: Row) -> Group:
    return [*group, demonstration_at(demonstration, len(group))]


def demonstration_at(row: Row, position: int) -> Row:
    return replace(row, place=(row.place[0], position, True))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def rewards(rows: Group, *, own: bool = False) -> list[float]:
    """The rewards of all rows, or of the policy's own rows."""
    return [row.reward for row in rows if not (own and row.demonstration)]


def normalised(group: Group) -> list[float]:
    """(r − mean)/(std + 1e-6) over all rows."""
    return [(row.reward - mean(rewards(group))) / (deviation(rewards(group)) + 1e-6) for row in group]


def surrogate(row: Row, advantage: float, *, low: float = 0.2, high: float = 0.2, dual: float = 3.0) -> Tensor:
    """Σ over tokens of the loss: −min(ρA, clip(ρ, 1 − low, 1 + high) A), at most −dual·A where A < 0."""
    terms = []
    for log_ratio in row.policy - row.old:
        ratio = log_ratio.exp()
        objective = min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        if advantage < 0:
            objective = max(objective, torch.full_like(objective, dual * advantage))
        terms.append(-objective)
    return torch.stack(terms).sum()


def unclipped(row: Row, advantage: float) -> Tensor:
    return -(advantage * (row.policy - row.old).exp()).sum()


def shaped(row: Row, advantage: float) -> Tensor:
    probability = row.policy.exp()
    return -(advantage * probability / (probability + 0.1)).sum()


def logarithm(row: Row, advantage: float) -> Tensor:
    """log f. Its gradient is that of log π, but smaller for tokens that the policy is likely to write anyway."""
    return -advantage * (row.policy - (row.policy.exp() + 1).log()).sum()


def power(row: Row, advantage: float) -> Tensor:
    """(f^κ − 1)/κ with κ = 0.3 and λ = 0.5, between f and log f."""
    probability = row.policy.exp()
    return -advantage * (((probability / (probability + 0.5)) ** 0.3 - 1) / 0.3).sum()


def trust_region(row: Row, advantage: float) -> Tensor:
    """TrSFT (arXiv 2512.17636): log π with the weight min(π/0.2, 1), whose integral is 1 + log(π/0.2) above 0.2."""
    probability = row.policy.exp()
    return -advantage * torch.where(probability < 0.2, probability / 0.2, 1 + (probability / 0.2).log()).sum()


def uncertain(row: Row, advantage: float) -> Tensor:
    """CHORD: log π with the weight π(1 − π), which is the slope of π − π²/2."""
    probability = row.policy.exp()
    return -advantage * (probability - probability**2 / 2).sum()


def imitated(row: Row, advantage: float) -> Tensor:
    return -advantage * row.policy.sum()


def tokens(rows: Group) -> int:
    return sum(len(row.policy) for row in rows)


def surrogate_loss(
    groups: list[Group],
    advantages: list[list[float]],
    of_demonstration: Callable[[Row, float], Tensor] = shaped,
    **clip: float,
) -> tuple[Tensor, Group]:
    """The mean of the token losses; the tokens of a demonstration have their own loss."""
    total = torch.zeros((), dtype=torch.float64)
    for group, of_group in zip(groups, advantages, strict=True):
        for row, advantage in zip(group, of_group, strict=True):
            term = of_demonstration(row, advantage) if row.demonstration else surrogate(row, advantage, **clip)
            total = total + term
    rows = [row for group in groups for row in group]
    return total / tokens(rows), rows


def grpo(groups: list[Group], _: list[Row]) -> tuple[Tensor, Group]:
    return surrogate_loss(groups, [normalised(group) for group in groups])


def dapo(groups: list[Group], _: list[Row]) -> tuple[Tensor, Group]:
    """DAPO: clip-higher (a larger upper clip bound), and only groups with a success and a failure."""
    kept = [group for group in groups if 0 < sum(rewards(group)) < len(group)]
    return surrogate_loss(kept, [normalised(group) for group in kept], low=0.2, high=0.28)


def paper(groups: list[Group], demonstrations: list[Row]) -> tuple[Tensor, Group]:
    groups = [replaced(g, d) if paper_gate(g) else g for g, d in zip(groups, demonstrations, strict=True)]
    return surrogate_loss(groups, [normalised(group) for group in groups])


def plus(
    groups: list[Group],
    demonstrations: list[Row],
    of_demonstration: Callable[[Row, float], Tensor] = logarithm,
) -> tuple[Tensor, Group]:
    """HAPO+ in its first step, where γ is the paper's.

    Rollouts are compared with rollouts; the demonstration's advantage is divided by the deviation of all rows.
    """
    groups = [appended(g, d) if paper_gate(g) else g for g, d in zip(groups, demonstrations, strict=True)]
    advantages = []
    for group in groups:
        own = rewards(group, own=True)
        advantages.append(
            [
                (row.reward - mean(own)) / ((deviation(rewards(group)) if row.demonstration else deviation(own)) + 1e-6)
                for row in group
            ]
        )
    return surrogate_loss(groups, advantages, of_demonstration)


def s_grpo(groups: list[Group], demonstrations: list[Row]) -> tuple[Tensor, Group]:
    """S-GRPO: a group of failures gets its demonstration, whose loss is −A log π; advantages are over all rows."""
    groups = [g if any(rewards(g)) else appended(g, d) for g, d in zip(groups, demonstrations, strict=True)]
    return surrogate_loss(groups, [normalised(group) for group in groups], imitated)


def chord(groups: list[Group], demonstrations: list[Row]) -> tuple[Tensor, Group]:
    """CHORD: 0.9 times GRPO's mean over the policy's tokens plus 0.1 times the mean over the demonstrations' tokens."""
    own = sum(
        surrogate(row, advantage) for group in groups for row, advantage in zip(group, normalised(group), strict=True)
    )
    expert = sum(uncertain(row, 1.0) for row in demonstrations)
    rows = [row for g, d in zip(groups, demonstrations, strict=True) for row in appended(g, d)]
    return 0.9 * own / sum(tokens(group) for group in groups) + 0.1 * expert / tokens(demonstrations), rows


def luffy(
    groups: list[Group],
    demonstrations: list[Row],
    *,
    of_row: Callable[[Row, float], Tensor] = unclipped,
    own_statistics: bool = False,
) -> tuple[Tensor, Group]:
    """LUFFY: sum over tokens divided by the run's response length, mean over rows; entropy bonus 0.001."""
    total, rows = torch.zeros((), dtype=torch.float64), []
    for group, demonstration in zip(groups, demonstrations, strict=True):
        injected = replaced(group, demonstration)
        baseline = mean(rewards(injected, own=own_statistics))
        for row in injected:
            term = shaped if row.demonstration else of_row
            total = total + term(row, row.reward - baseline) - 0.001 * row.entropy.sum()
        rows += injected
    return total / LIMIT / len(rows), rows


def luffy_clipped(groups: list[Group], demonstrations: list[Row]) -> tuple[Tensor, Group]:
    return luffy(groups, demonstrations, of_row=surrogate)


def luffy_own_statistics(groups: list[Group], demonstrations: list[Row]) -> tuple[Tensor, Group]:
    return luffy(groups, demonstrations, own_statistics=True)


def srft(groups: list[Group], demonstrations: list[Row]) -> tuple[Tensor, Group]:
    """SRFT: log π with the weights 0.5 e^−H, 0.1 e^H and −1; mean over all tokens."""
    groups = [appended(g, d) for g, d in zip(groups, demonstrations, strict=True)]
    rows = [row for group in groups for row in group]
    entropy = torch.cat([row.entropy for row in rows]).mean().item()
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for row, advantage in zip(group, normalised(group), strict=True):
            likelihood = row.policy.sum()
            if row.demonstration:
                total = total - 0.5 * math.exp(-entropy) * likelihood + shaped(row, advantage)
            else:
                total = total - (0.1 * math.exp(entropy) if row.reward == 1 else -1.0) * likelihood
    return total / tokens(rows), rows


def real(groups: list[Group], _: list[Row]) -> tuple[Tensor, Group]:
    """REAL: log(1 + Σ₊ e^{−s/τ}) + log(1 + Σ₋ e^{s/τ}), τ = 0.5, of groups with both classes, divided by all groups."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        # s/τ
        right = [(row.policy - row.old).mean() / 0.5 for row in group if row.reward == 1]
        wrong = [(row.policy - row.old).mean() / 0.5 for row in group if row.reward == 0]
        if right and wrong:
            total = total + (1 + sum((-s).exp() for s in right)).log() + (1 + sum(s.exp() for s in wrong)).log()
    return total / len(groups), [row for group in groups for row in group]


def real_ssi(groups: list[Group], demonstrations: list[Row]) -> tuple[Tensor, Group]:
    return real(
        [replaced(g, d) if paper_gate(g) else g for g, d in zip(groups, demonstrations, strict=True)], demonstrations
    )


# The keys are the preset names as in `+hapo=NAME`.
FORMULAS: dict[str, Callable[[list[Group], list[Row]], tuple[Tensor, Group]]] = {
    "grpo": grpo,
    "dapo": dapo,
    "luffy": luffy,
    "luffy hapo.loss.clip=true": luffy_clipped,
    "luffy hapo.advantage.statistics=on_policy": luffy_own_statistics,
    "srft": srft,
    "real": real,
    "real_ssi": real_ssi,
    "paper": paper,
    "plus": plus,
    "plus hapo.loss.exponent=0.3 hapo.loss.shaping=0.5": partial(plus, of_demonstration=power),
    "plus hapo.loss.shape=trsft hapo.loss.shaping=0.2": partial(plus, of_demonstration=trust_region),
    "plus hapo.loss.shape=chord": partial(plus, of_demonstration=uncertain),
    "plus hapo.loss.shaping=inf": partial(plus, of_demonstration=imitated),
    "chord": chord,
    "s_grpo": s_grpo,
}
