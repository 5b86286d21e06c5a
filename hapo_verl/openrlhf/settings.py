"""The file that sets an agent executor up: the `hapo:` block, the reward, and what OpenRLHF does not tell an executor.

The block's keys, defaults and errors are those of `hapo_verl.config`. Keys of what OpenRLHF does by itself, its loss
above all, are refused: they would change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hapo_verl.config import AnnealedGate, ConfigError, HapoConfig

_READ = ("gate", "budget", "injection", "advantage", "success_threshold", "demonstration_key", "seed")
_KEYS = ("hapo", "reward", "groups_per_engine", "first_step")


@dataclass(frozen=True)
class Settings:
    """What stands in the file.

    Attributes:
        hapo: the checked block.
        reward: a Python file with `reward_func(queries, prompts, labels)`, or the URL of a reward server.
        groups_per_engine: prompts of training that each vLLM engine gets in a step; needed by schedules and budgets.
        first_step: 1, or after a restart the step that the checkpoint continues with.
    """

    hapo: HapoConfig
    reward: str
    groups_per_engine: int | None = None
    first_step: int = 1

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Settings:
        """The checked settings of a YAML or JSON file; the path of a reward's file counts from the file's folder.

        Raises:
            ConfigError: one line, on the first thing that cannot work.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path}: cannot be read ({reason}). Name a YAML file with the block hapo.") from None
        if not isinstance(content, Mapping) or not set(content) <= set(_KEYS):
            raise ConfigError(f"{path}: other keys than {', '.join(_KEYS)}, or none. Use these.")
        block, reward = content.get("hapo") or {}, content.get("reward")
        hapo = HapoConfig.parse(block)
        for key in block:
            if key not in _READ:
                raise ConfigError(f"hapo.{key}: OpenRLHF's loss and trainer have nothing that reads it. Remove it.")
        for key, value, wrong, rule in _rules(hapo, content):
            if wrong:
                raise ConfigError(f"{key}={value}: {rule}")
        if not str(reward).startswith(("http://", "https://")):
            code = path.parent / str(reward)
            if code.suffix != ".py" or not code.is_file():
                raise ConfigError(f"reward={reward}: no such Python file, and no URL. Name a file with reward_func.")
            reward = str(code)
        return cls(hapo, str(reward), content.get("groups_per_engine"), content.get("first_step", 1))


def _rules(hapo: HapoConfig, content: Mapping[str, Any]) -> list[tuple[str, Any, bool, str]]:
    """Key, value, whether it cannot work, and the rule with the fix."""
    gate, annealed, first = hapo.gate.name, isinstance(hapo.gate, AnnealedGate), content.get("first_step", 1)
    groups, steps = content.get("groups_per_engine"), annealed or hapo.budget.share < 1 or hapo.budget.horizon
    counted = not steps if groups is None else type(groups) is int and groups > 0
    return [
        ("hapo.gate.name", gate, gate in ("adaptive", "posterior", "thompson"), "remembers all prompts of a run; an "
         "executor sees those of its own vLLM engine. Use hapo.gate.name=annealed."),
        ("hapo.gate.horizon", None, annealed and getattr(hapo.gate, "horizon", None) is None, "an executor is not told "
         "how many steps a run has. Set hapo.gate.horizon to that number."),
        ("hapo.injection.mode", hapo.injection.mode, hapo.injection.mode != "replace", "OpenRLHF's groups have a fixed "
         "number of rows. Use hapo.injection.mode=replace."),
        ("hapo.advantage.statistics", "on_policy", hapo.advantage.statistics == "on_policy", "OpenRLHF's group_norm "
         "compares all rows of a group. Use hapo.advantage.statistics=all."),
        ("groups_per_engine", groups, not counted, "schedules and budgets count steps by it. "
         "Use --rollout.batch_size divided by --vllm.num_engines."),
        ("first_step", first, type(first) is not int or first < 1, "a step is a positive integer. Use 1 to begin."),
    ]  # fmt: skip
