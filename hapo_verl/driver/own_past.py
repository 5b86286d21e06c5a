"""The policy's own successes, kept by the trainer: recalled when a prompt is submitted, observed when it trained.

    worker: tags a rollout that is a success with its end of sequence
    driver: of each group that was trained on, keeps the shortest such row of which no token was rejected
    worker: injects it into a later group of the prompt that the gate wants to help

What is padding, was filtered out with its group, or is a demonstration itself, is never kept.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hapo_verl.algo.arrays_file import read_arrays, write_arrays
from hapo_verl.algo.demonstration import Response
from hapo_verl.algo.own_successes import MIB, OwnSuccesses
from hapo_verl.config import ConfigError, DemonstrationsConfig
from hapo_verl.protocol.rows import OWN_SUCCESS

__all__ = ["OWN_PAST_FILE", "OwnPast", "shortest_successes"]

logger = logging.getLogger("verl." + __name__)

# In the folder of a checkpoint.
OWN_PAST_FILE = "hapo_own_past.npz"


class OwnPast:
    """`OwnSuccesses` with its file in a checkpoint and its metrics."""

    def __init__(self, config: DemonstrationsConfig) -> None:
        """Nothing yet; the block says how much and for how long."""
        self._config = config
        self._successes = OwnSuccesses(config.own_memory_mib * MIB, max_age=config.own_max_age)

    def recall(self, key: int, step: int) -> bytes:
        """The prompt's success as the worker unpacks it; nothing where there is none, or it is too old.

        Args:
            key: `prompt_key` of the prompt.
            step: in which it is submitted.
        """
        return self._successes.recall(key, step)

    def observe(self, successes: Iterable[tuple[int, Response]], step: int) -> None:
        """Keep what one update has of successes: (key of the prompt, response), and the update's step."""
        self._successes.observe(successes, step)

    def metrics(self) -> dict[str, float]:
        """How much is kept: prompts, MiB, and successes that had to make room in this run."""
        successes = self._successes
        return {
            "hapo/own_past/prompts": float(len(successes)),
            "hapo/own_past/mib": successes.nbytes / MIB,
            "hapo/own_past/evicted": float(successes.evicted),
        }

    def save(self, folder: Path) -> None:
        """Write everything into a checkpoint folder, whole or not at all."""
        write_arrays(folder / OWN_PAST_FILE, self._successes.arrays())

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder.

        Raises:
            ConfigError: where the file holds no successes.
        """
        path = folder / OWN_PAST_FILE
        if not path.exists():
            logger.warning("hapo: %s has no %s; the policy's own past starts anew", folder, OWN_PAST_FILE)
            return
        try:
            self._successes.restore(read_arrays(path))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{path}: not the policy's successes ({error}). Resume from another checkpoint with "
                "trainer.resume_from_path, or remove that file to start anew."
            ) from None


def shortest_successes(
    tags: Sequence[Mapping[str, Any]], uids: Sequence[str], whole: Sequence[bool], keys: Mapping[str, int | None]
) -> list[int]:
    """Positions of a batch's rows that are worth fetching: of each group the shortest successes.

    Args:
        tags: of the rows.
        uids: of the rows' groups.
        whole: False for padding, and for rows of which a token was rejected.
        keys: of each group's prompt, by its uid.
    """
    by_group: dict[str, list[int]] = defaultdict(list)
    for row, (tag, uid, is_whole) in enumerate(zip(tags, uids, whole, strict=True)):
        if tag.get(OWN_SUCCESS) and is_whole and keys.get(uid) is not None:
            by_group[uid].append(row)
    rows = []
    for candidates in by_group.values():
        shortest = min(tags[row]["response_len"] for row in candidates)
        rows += [row for row in candidates if tags[row]["response_len"] == shortest]
    return rows
