"""The gate's state, kept by the trainer: what a prompt's group is to be judged by is attached when it is submitted.

Rollout workers come and go and see a few groups each; the trainer sees all of them and owns the checkpoint. So the
schedule, the running success, the prompts' posteriors and the policy's own successes live here, and a worker gets one
small mapping a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hapo_verl.algo.gate_state import STATE_FILE, GateState
from hapo_verl.algo.posterior import prompt_key
from hapo_verl.config import HapoConfig
from hapo_verl.driver.own_past import OwnPast

__all__ = ["STATE_FILE", "Gatekeeper", "row_name"]

logger = logging.getLogger("verl." + __name__)


class Gatekeeper:
    """`GateState` in verl's terms: rows of its data, batches of its columns, and plain values for its workers."""

    def __init__(self, hapo: HapoConfig, *, total_steps: int) -> None:
        """A gate that has seen nothing.

        Args:
            hapo: the `hapo:` block.
            total_steps: of the run; the horizon of a schedule that names none.
        """
        self.state = GateState(
            hapo, total_steps=total_steps, resume_key="trainer.resume_from_path", data_key="data.train_files"
        )
        self.threshold = self.state.threshold
        self.own_past = OwnPast(hapo.demonstrations) if hapo.demonstrations.remembers else None

    def save(self, folder: Path) -> None:
        """Write what is remembered into a checkpoint folder; nothing where nothing is."""
        self.state.save(folder)
        if self.own_past is not None:
            self.own_past.save(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder.

        Raises:
            ConfigError: where what it holds is another gate's or another data set's, or cannot be read.
        """
        self.state.load(folder)
        if self.own_past is not None:
            self.own_past.load(folder)

    def know(self, rows: Any, *, prompt_column: str) -> None:
        """Take note of the training data's prompts, where something is remembered of prompts.

        Args:
            rows: verl's data frame, one mapping a row.
            prompt_column: `data.prompt_key`.
        """
        if not self.state.remembers_prompts and self.own_past is None:
            return
        count, hashed = len(rows), 0
        keys, sources = np.empty(count, dtype=np.uint64), [""] * count
        for number, row in enumerate(rows):
            keys[number], sources[number], indexed = row_name(row, prompt_column)
            hashed += not indexed
        if self.state.remembers_prompts:
            self.state.know(keys, sources)
        if hashed:
            logger.warning(
                "hapo: %d of %d prompts have no extra_info.index and are known by a hash of their text", hashed, count
            )
        shared = count - len(np.unique(keys))
        if shared:
            logger.warning(
                "hapo: %d of %d rows share data_source and extra_info.index (or their text) with an earlier row, and "
                "share what is remembered of it; give each prompt an index of its own",
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
            The fields of `Situation` and the prompt's `key`, None where no prompt is remembered; and `own`, the packed
            success that the policy itself has had, empty where it had none, absent where none is kept.
        """
        prompts = len(batch["raw_prompt"])
        keys: list[int | None] = [None] * prompts
        if self.state.posterior is not None or self.own_past is not None:
            columns = {name: batch[name] for name in ("data_source", "extra_info", prompt_column) if name in batch}
            rows = [{name: column[i] for name, column in columns.items()} for i in range(prompts)]
            keys = [row_name(row, prompt_column)[0] for row in rows]
        situations = zip(self.state.situations(keys, step), keys, strict=True)
        return [asdict(situation) | {"key": key} | self._own(key, step) for situation, key in situations]

    def observe(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Learn from one update's groups; demonstrations are not among their rollouts.

        Args:
            groups: `hapo_group` of each, padding left out.
        """
        gated = [group for group in groups if group["firing"] is not None]
        self.state.observe(
            [sum(group["successes"]) for group in gated],
            [len(group["successes"]) for group in gated],
            [group["key"] for group in gated],
        )

    def _own(self, key: int | None, step: int) -> dict[str, bytes]:
        return {} if self.own_past is None or key is None else {"own": self.own_past.recall(key, step)}


def row_name(row: Mapping[str, Any], prompt_column: str) -> tuple[int, str, bool]:
    """The prompt's key, its data source, and whether `extra_info.index` names it (else its text does)."""
    source = sys.intern(str(row.get("data_source") or "unknown"))
    index = (row.get("extra_info") or {}).get("index")
    if index is not None:
        return prompt_key(source, str(index)), source, True
    text = json.dumps([[m.get("role"), m.get("content")] for m in row[prompt_column]], default=str)
    return prompt_key(source, "text", text), source, False
