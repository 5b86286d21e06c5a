"""The recorded batch of the goldens: four groups of eight rollouts with 0, 3, 7 and 8 successes, each with a demonstration.

Each token has log π of the policy in training, log π_old and the entropy; a token of a tool, which does not train, is
null. The batch is drawn from a seed. The goldens are the formulas' loss on this batch and, for each row, the norm and
the first two entries of the gradient with respect to its log-probabilities. `golden_batch.json` was written by

    python -m tests.actor.golden_batch
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.actor.golden_formulas import FORMULAS, LIMIT, Group, Row

FILE = Path(__file__).with_suffix(".json")
ROLLOUTS, SUCCESSES = 8, (0, 3, 7, 8)


@dataclass(frozen=True)
class Result:
    """A loss and its gradients by row, and the part of them that a golden stores."""

    loss: float
    of_policy: dict[tuple[int, int, bool], Tensor]
    of_entropy: dict[tuple[int, int, bool], Tensor]

    def golden(self) -> dict[str, Any]:
        """The stored part, with nine digits; rows are named group/row, and demonstrations have a star."""
        return {
            "loss": rounded(self.loss),
            "gradient": {
                f"{group}/{row}{'*' * demonstration}": [
                    rounded(value) for value in (slope.norm().item(), *slope[:2].tolist())
                ]
                for (group, row, demonstration), slope in self.of_policy.items()
            },
        }


def evaluate(launch: str, recorded: dict[str, Any]) -> Result:
    """Evaluate the formula of a launch on the recorded batch."""
    loss, rows = FORMULAS[launch](*read(recorded))
    leaves = [row.policy for row in rows] + [row.entropy for row in rows]
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    places = [row.place for row in rows]
    of_policy, of_entropy = (
        dict(zip(places, part, strict=True)) for part in (slopes[: len(rows)], slopes[len(rows) :])
    )
    return Result(loss.item(), of_policy, of_entropy)


def read(recorded: dict[str, Any]) -> tuple[list[Group], list[Row]]:
    """Read the groups and their demonstrations, with log-probabilities and entropies as leaf tensors."""

    def row(fields: dict[str, Any], place: tuple[int, int, bool]) -> Row:
        policy, old, entropy = (
            torch.tensor([value for value in fields[name] if value is not None], dtype=torch.float64)
            for name in ("policy", "old", "entropy")
        )
        reward, truncated = float(fields["reward"]), bool(fields.get("truncated"))
        leaves = policy.requires_grad_(), old, entropy.requires_grad_()
        return Row(place, reward, truncated, len(fields["policy"]), *leaves)

    groups = [
        [row(fields, (number, i, False)) for i, fields in enumerate(group["rollouts"])]
        for number, group in enumerate(recorded["groups"])
    ]
    return groups, [row(group["demonstration"], (i, -1, True)) for i, group in enumerate(recorded["groups"])]


def record(seed: int = 77) -> dict[str, Any]:
    """Draw the batch from a seed."""
    rng = random.Random(seed)

    def row(length: int, reward: int, **more: Any) -> dict[str, Any]:
        policy, old, entropy = [], [], []
        for _ in range(length):
            old.append(round(-0.05 - 2.5 * rng.random(), 3))
            # Half of the ratios are within the clip range, some far outside: a ratio above 3 is a log-ratio above 1.1.
            spread = rng.choice((0.15, 0.15, 0.4, 1.2))
            policy.append(round(min(-0.005, old[-1] + spread * rng.uniform(-1.5, 1.5)), 3))
            entropy.append(round(0.05 + 1.5 * rng.random(), 3))
        return {"reward": reward, **more, "policy": policy, "old": old, "entropy": entropy}

    groups = []
    for successes in SUCCESSES:
        labels = [1] * successes + [0] * (ROLLOUTS - successes)
        rng.shuffle(labels)
        # One is longer than all others, so that the replaced rollout is not chosen at random.
        lengths = [*rng.sample(range(2, LIMIT - 2), ROLLOUTS - 1), LIMIT - 1]
        rng.shuffle(lengths)
        rollouts = [row(length, label) for length, label in zip(lengths, labels, strict=True)]
        groups.append({"rollouts": rollouts, "demonstration": row(rng.randint(3, LIMIT - 1), 1)})
    # Two rollouts of the first group reach the limit, and one of them is truncated. A random draw would take the other.
    groups[0]["rollouts"][2] = row(LIMIT, 0, truncated=True)
    groups[0]["rollouts"][5] = row(LIMIT, 0)
    for name in ("policy", "old", "entropy"):
        groups[1]["rollouts"][4][name][1] = None
    return {"groups": groups}


def rounded(value: float) -> float:
    # This avoids -0.0.
    return float(f"{value:.9g}") + 0.0


def main() -> None:
    recorded = record()
    goldens = {launch: evaluate(launch, recorded).golden() for launch in FORMULAS}
    text = json.dumps(recorded | {"goldens": goldens}, indent=1)
    # Each list of numbers is on one line.
    text = re.sub(
        r"\[[^\[\]{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
