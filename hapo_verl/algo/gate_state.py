"""The state of a gate over a run: the step, the running success, the prompts' earlier visits, and the budget.

A run has one such state, in the process that sees all groups and writes checkpoints. The configuration names the gate,
and so the rule; the rules themselves are in `schedule.py` and `posterior.py`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hapo_verl.algo.arrays_file import read_arrays, write_arrays
from hapo_verl.algo.gate import Situation
from hapo_verl.algo.injection import Rollout
from hapo_verl.algo.judgement import Judgement, judged
from hapo_verl.algo.posterior import PromptPosterior
from hapo_verl.algo.schedule import RunningSuccess, adaptive, admitted, annealed
from hapo_verl.config import AdaptiveGate, AnnealedGate, ConfigError, HapoConfig, PaperGate, PosteriorGate

logger = logging.getLogger("hapo_verl")

# File name inside a checkpoint folder.
STATE_FILE = "hapo_gate.npz"


class GateState:
    """Gives the gate's `Situation` for prompts about to be sampled, and learns from the outcomes of earlier groups."""

    def __init__(self, hapo: HapoConfig, *, total_steps: int, resume_key: str, data_key: str) -> None:
        """Start without any outcomes.

        Args:
            hapo: the `hapo:` block; gate, budget and seed are read.
            total_steps: steps of the run; used as the horizon of a schedule without a horizon of its own.
            resume_key: the trainer's configuration key for the checkpoint to resume from; used in error messages.
            data_key: the trainer's configuration key for the training data; used in error messages.
        """
        self._hapo, self.total_steps = hapo, total_steps
        self._resume_key, self._data_key = resume_key, data_key
        self._running = RunningSuccess()
        self._posterior: PromptPosterior | None = None
        self._submitted = (0, 0)  # step, prompts submitted in it

    @property
    def remembers_prompts(self) -> bool:
        """Whether the gate keeps a posterior per prompt, so that `know` must be called first."""
        return isinstance(self._hapo.gate, PosteriorGate)

    @property
    def posterior(self) -> PromptPosterior | None:
        """The prompts' posteriors; None if the gate keeps none, or before `know`."""
        return self._posterior

    def know(self, keys: Sequence[int] | NDArray[np.uint64], sources: Sequence[str]) -> None:
        """Register the prompts of the training data; needed only if `remembers_prompts`.

        Args:
            keys: `prompt_key` of each row.
            sources: data source of each row.
        """
        self._posterior = PromptPosterior(keys, sources)

    def situations(self, keys: Sequence[int | None], step: int) -> list[Situation]:
        """What the gate knows of each of P prompts before their rollouts are scored.

        Args:
            keys: `prompt_key` of each prompt; not read by gates without a posterior per prompt.
            step: training step, 1 for the first update.
        """
        threshold, priors = self.threshold(step), [self._constant_prior()] * len(keys)
        gate = self._hapo.gate
        if self._posterior is not None and isinstance(gate, PosteriorGate):
            known = [key for key in keys if key is not None]
            success_P, failure_P = self._posterior.priors(known, strength=gate.strength, discount=gate.discount)
            priors = list(zip(success_P, failure_P, strict=True))
        allowed = self._admitted(len(keys), step)
        return [Situation(threshold, *prior, admitted=allow) for prior, allow in zip(priors, allowed, strict=True)]

    def threshold(self, step: int) -> float:
        """The threshold γ of a step (1 for the first update); 0 for gates without a threshold."""
        gate = self._hapo.gate
        if isinstance(gate, AnnealedGate):
            horizon = gate.horizon or self.total_steps
            return annealed(gate.threshold, step - 1, horizon=horizon, power=gate.power)
        if isinstance(gate, AdaptiveGate):
            return adaptive(gate.threshold, self._running)
        return gate.threshold if isinstance(gate, PaperGate | PosteriorGate) else 0.0

    def observe(self, successes: Sequence[int], rollouts: Sequence[int], keys: Sequence[Any]) -> None:
        """Learn from the outcomes of one update's groups.

        Args:
            successes: S of each group, demonstrations not counted.
            rollouts: N of each group, demonstrations not counted.
            keys: `prompt_key` of each group; not read by gates without a posterior per prompt.
        """
        gate = self._hapo.gate
        if isinstance(gate, AdaptiveGate) and successes:
            self._running = self._running.after(sum(successes) / sum(rollouts), gate.memory)
        if self._posterior is not None and isinstance(gate, PosteriorGate):
            self._posterior.observe(keys, successes, rollouts, discount=gate.discount, memory=gate.memory)

    def judge(
        self, rollouts: Sequence[Rollout], per_group: int, keys: Sequence[int | None], *, step: int, seed: str | int
    ) -> list[Judgement]:
        """Apply the gate to a whole batch of scored groups, and learn from the outcomes of those that can be judged.

        Args:
            rollouts: P · N rows, group by group.
            per_group: N ≥ 2.
            keys: as for `situations`.
            step: training step, 1 for the first update.
            seed: what tells the batches of a step apart.
        """
        situations, hapo = self.situations(keys, step), self._hapo
        found = judged(rollouts, per_group, situations, gate=hapo.gate.name, seed=f"{hapo.seed}/{step}/{seed}")
        gated = [(judgement.successes, key) for judgement, key in zip(found, keys, strict=True) if judgement.gated]
        self.observe([successes for successes, _ in gated], [per_group] * len(gated), [key for _, key in gated])
        return found

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder, atomically; does nothing for gates without state."""
        if not self._has_state:
            return
        running = [np.nan if value is None else value for value in (self._running.first, self._running.mean)]
        arrays: dict[str, Any] = {"gate": np.array(self._hapo.gate.name), "running": np.array(running)}
        if self._posterior is not None:
            arrays |= self._posterior.arrays()
        write_arrays(folder / STATE_FILE, arrays)

    def load(self, folder: Path) -> None:
        """Restore the state from a checkpoint folder; a folder without a state file only logs a warning.

        Raises:
            ConfigError: if the state belongs to another gate or another data set, or cannot be read.
        """
        path = folder / STATE_FILE
        if not self._has_state:
            return
        if not path.exists():
            logger.warning("hapo: %s has no %s; the gate %s starts anew", folder, STATE_FILE, self._hapo.gate.name)
            return
        try:
            arrays = read_arrays(path)
            name, running = str(arrays["gate"]), arrays["running"].tolist()
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{path}: not a gate's state ({error}). Resume from another checkpoint with {self._resume_key}."
            ) from None
        if name != self._hapo.gate.name:
            raise ConfigError(
                f"hapo.gate.name={self._hapo.gate.name}: {path} was written by the gate {name}. "
                f"Use hapo.gate.name={name}, or remove that file to start anew."
            )
        self._running = RunningSuccess(*(None if np.isnan(value) else value for value in running))
        if self._posterior is not None:
            try:
                self._posterior.restore(arrays)
            except ValueError:
                raise ConfigError(
                    f"{self._data_key}: {path} belongs to another data set (its prompts have other ids). "
                    "Use the data of that run, or remove that file to start anew."
                ) from None

    @property
    def _has_state(self) -> bool:
        return isinstance(self._hapo.gate, AdaptiveGate | PosteriorGate)

    def _constant_prior(self) -> tuple[float, float]:
        gate = self._hapo.gate
        return (gate.prior_success, gate.prior_failure) if isinstance(gate, PaperGate) else (1.0, 1.0)

    def _admitted(self, prompts: int, step: int) -> list[bool]:
        budget = self._hapo.budget
        share = budget.share
        if budget.horizon is not None:
            share = annealed(share, step - 1, horizon=budget.horizon)
        submitted = self._submitted[1] if self._submitted[0] == step else 0
        self._submitted = (step, submitted + prompts)
        rng = random.Random(f"{self._hapo.seed}/budget/{step}/{submitted}")
        return admitted(prompts, share, submitted=submitted, rng=rng)
