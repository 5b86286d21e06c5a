"""`hapo.rollouts.allocate=posterior` in the trainer: how many rollouts each prompt of a step gets, and what came of it.

The numbers are computed when the prompts are submitted, from the priors that their gate gets. A step has as many
rollouts as with `uniform`, so verl divides its rows into the same mini-batches. Nothing is kept from step to step: the
posteriors are in the gate's checkpoint, so a resumed run allocates as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hapo_verl.algo.allocation import allocate, expected_signal
from hapo_verl.config import RolloutsConfig

__all__ = ["Rollouts"]


class Rollouts:
    """The allocation of the step in progress, with its metrics."""

    def __init__(self, config: RolloutsConfig, per_prompt: int) -> None:
        """Before the first step.

        Args:
            config: the block, with `allocate=posterior`.
            per_prompt: `actor_rollout_ref.rollout.n`, the mean number of rollouts of a prompt.
        """
        self._per_prompt = per_prompt
        self._least, self._most = config.bounds(per_prompt)
        self._allocated: dict[str, float] = {}

    def allocate(self, situations: Sequence[Mapping[str, Any]]) -> list[int]:
        """The number of rollouts of each prompt of a step; their mean is `per_prompt`.

        Args:
            situations: of the step's prompts, as `Gatekeeper.situations` returns them.
        """
        priors = [(situation["prior_success"], situation["prior_failure"]) for situation in situations]
        total = len(priors) * self._per_prompt
        rollouts = allocate(priors, total=total, least=self._least, most=self._most)
        self._allocated = {
            "hapo/rollouts/least": float(min(rollouts)),
            "hapo/rollouts/most": float(max(rollouts)),
            "hapo/rollouts/signals_expected": _expected(rollouts, priors),
            "hapo/rollouts/signals_expected_uniform": _expected([self._per_prompt] * len(priors), priors),
        }
        return rollouts

    def metrics(self, groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of the step.

        Args:
            groups: `hapo_group` of each, padding left out.

        Returns:
            The smallest and the largest number of rollouts of a prompt; the number of groups in which by the prompts'
            posteriors some rollouts succeed and some fail, and that number if each prompt had `per_prompt`; and the
            number of groups in which they did. Demonstrations are not rollouts.
        """
        signals = sum(0 < sum(group["successes"]) < len(group["successes"]) for group in groups)
        return self._allocated | {"hapo/rollouts/signals": float(signals)}


def _expected(rollouts: Sequence[int], priors: Sequence[tuple[float, float]]) -> float:
    return sum(
        expected_signal(n, prior_success=success, prior_failure=failure)
        for n, (success, failure) in zip(rollouts, priors, strict=True)
    )
