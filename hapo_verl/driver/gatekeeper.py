"""The gate's state, kept by the trainer: what a prompt's group is to be judged by is attached when it is submitted.

Rollout workers come and go and see a few groups each; the trainer sees all of them and owns the checkpoint. So the
schedule, the running success and the prompts' posteriors live here, and a worker gets one small mapping a prompt.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hapo_verl.algo.gate import Situation
from hapo_verl.algo.posterior import PromptPosterior, prompt_key
from hapo_verl.algo.schedule import RunningSuccess, adaptive, admitted, annealed
from hapo_verl.config import AdaptiveGate, AnnealedGate, ConfigError, HapoConfig, PaperGate, PosteriorGate

logger = logging.getLogger("verl." + __name__)

# In verl's checkpoint folder `global_step_<t>`.
STATE_FILE = "hapo_gate.npz"


class Gatekeeper:
    """Situations for prompts about to be sampled, and the memory of what came of those before."""

    def __init__(self, hapo: HapoConfig, *, total_steps: int) -> None:
        """A gate that has seen nothing.

        Args:
            hapo: the `hapo:` block.
            total_steps: of the run; the horizon of a schedule that names none.
        """
        self._hapo, self._total_steps = hapo, total_steps
        self._running = RunningSuccess()
        self._posterior: PromptPosterior | None = None
        self._submitted = (0, 0)  # step, prompts submitted in it

    def know(self, rows: Any, *, prompt_column: str) -> None:
        """Take note of the training data's prompts, where the gate remembers prompts.

        Args:
            rows: verl's data frame, one mapping a row.
            prompt_column: `data.prompt_key`.
        """
        if not isinstance(self._hapo.gate, PosteriorGate):
            return
        count, hashed = len(rows), 0
        keys, sources = np.empty(count, dtype=np.uint64), [""] * count
        for number, row in enumerate(rows):
            keys[number], sources[number], indexed = row_name(row, prompt_column)
            hashed += not indexed
        self._posterior = PromptPosterior(keys, sources)
        if hashed:
            logger.warning(
                "hapo: %d of %d prompts have no extra_info.index and are known by a hash of their text", hashed, count
            )
        shared = count - len(self._posterior.key_K)
        if shared:
            logger.warning(
                "hapo: %d of %d rows share data_source and extra_info.index (or their text) with an earlier row, and "
                "share its posterior; give each prompt an index of its own",
                shared,
                count,
            )

    def situations(self, batch: Mapping[str, Sequence[Any]], step: int, *, prompt_column: str) -> list[dict[str, Any]]:
        """What the gate will know of each prompt of a submission, as plain values.

        Args:
            batch: columns of the submitted prompts.
            step: verl's `global_steps`, 1 for the first.
            prompt_column: `data.prompt_key`.

        Returns:
            The fields of `Situation` and the prompt's `key`, None where no prompt is remembered.
        """
        prompts = len(batch["raw_prompt"])
        threshold, (success, failure), keys = self.threshold(step), self._constant_prior(), [None] * prompts
        priors = [(success, failure)] * prompts
        gate = self._hapo.gate
        if self._posterior is not None and isinstance(gate, PosteriorGate):
            columns = {name: batch[name] for name in ("data_source", "extra_info", prompt_column) if name in batch}
            rows = [{name: column[i] for name, column in columns.items()} for i in range(prompts)]
            keys = [row_name(row, prompt_column)[0] for row in rows]
            priors = list(
                zip(
                    *self._posterior.priors(keys, strength=gate.strength, discount=gate.discount),
                    strict=True,
                )
            )
        allowed = self._admitted(prompts, step)
        return [
            asdict(Situation(threshold, *prior, admitted=allow)) | {"key": key}
            for prior, allow, key in zip(priors, allowed, keys, strict=True)
        ]

    def threshold(self, step: int) -> float:
        """γ of a step; 0 for gates without one."""
        gate = self._hapo.gate
        if isinstance(gate, AnnealedGate):
            horizon = gate.horizon or self._total_steps
            return annealed(gate.threshold, step - 1, horizon=horizon, power=gate.power)
        if isinstance(gate, AdaptiveGate):
            return adaptive(gate.threshold, self._running)
        return gate.threshold if isinstance(gate, PaperGate | PosteriorGate) else 0.0

    def observe(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Learn from one update's groups; demonstrations are not among their rollouts.

        Args:
            groups: `hapo_group` of each, padding left out.
        """
        gated = [group for group in groups if group["firing"] is not None]
        rollouts = [len(group["successes"]) for group in gated]
        successes = [sum(group["successes"]) for group in gated]
        gate = self._hapo.gate
        if isinstance(gate, AdaptiveGate) and gated:
            self._running = self._running.after(sum(successes) / sum(rollouts), gate.memory)
        if self._posterior is not None and isinstance(gate, PosteriorGate):
            keys = [group["key"] for group in gated]
            self._posterior.observe(keys, successes, rollouts, discount=gate.discount, memory=gate.memory)

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder, whole or not at all; nothing where the gate keeps none."""
        if not self._has_state:
            return
        folder.mkdir(parents=True, exist_ok=True)
        running = [np.nan if value is None else value for value in (self._running.first, self._running.mean)]
        arrays: dict[str, Any] = {"gate": np.array(self._hapo.gate.name), "running": np.array(running)}
        if self._posterior is not None:
            arrays |= self._posterior.arrays()
        unfinished = folder / f".{STATE_FILE}.{os.getpid()}"
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        unfinished.replace(folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder.

        Raises:
            ConfigError: when the state is another gate's or another data set's, or cannot be read.
        """
        path = folder / STATE_FILE
        if not self._has_state:
            return
        if not path.exists():
            logger.warning("hapo: %s has no %s; the gate %s starts anew", folder, STATE_FILE, self._hapo.gate.name)
            return
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            name, running = str(arrays["gate"]), arrays["running"].tolist()
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"{path}: not a gate's state ({error}). Resume from another checkpoint with trainer.resume_from_path."
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
                    f"data.train_files: {path} belongs to another data set (its prompts have other ids). "
                    "Use the files of that run, or remove that file to start anew."
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


def row_name(row: Mapping[str, Any], prompt_column: str) -> tuple[int, str, bool]:
    """The prompt's key, its data source, and whether `extra_info.index` names it (else its text does)."""
    source = sys.intern(str(row.get("data_source") or "unknown"))
    index = (row.get("extra_info") or {}).get("index")
    if index is not None:
        return prompt_key(source, str(index)), source, True
    text = json.dumps([[m.get("role"), m.get("content")] for m in row[prompt_column]], default=str)
    return prompt_key(source, "text", text), source, False
