"""verl's built-in reward functions and a launch's own, for tools that verify a data set."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_verl.algo.injection import is_success
from hapo_verl.config import ConfigError

# (row of verl's parquet, solution's text with what tools answered in it, its `num_turns`) -> success
Succeeds = Callable[[Mapping[str, Any], str, int], bool]


def default_score(data_source: str, solution: str, ground_truth: str) -> float:
    """The score that verl's default reward function gives a solution.

    Args:
        data_source: the row's `data_source`, by which verl picks the function.
        solution: the response's text.
        ground_truth: the row's `reward_model.ground_truth`.
    """
    from verl.utils.reward_score import default_compute_score

    result = default_compute_score(data_source, solution, ground_truth)
    return float(result["score"] if isinstance(result, dict) else result)


def reward_of(path: str | None, name: str = "compute_score") -> DictConfig:
    """The part of a launch's configuration that names its reward function.

    Args:
        path: `reward.custom_reward_function.path`; None for verl's own, chosen by `data_source`.
        name: `reward.custom_reward_function.name`.
    """
    return OmegaConf.create({"reward": {"custom_reward_function": {"path": path, "name": name}}})


def success_of(config: DictConfig, threshold: float) -> Succeeds:
    """A launch's reward function, reduced to success: what the gate counts and a demonstration has to be.

    Args:
        config: a whole launch, or what `reward_of` gives.
        threshold: `hapo.success_threshold`.

    Raises:
        ConfigError: where the function cannot be loaded.
    """
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.reward_score import default_compute_score

    try:
        function = get_custom_reward_fn(config) or default_compute_score
    except Exception as error:
        path = config.reward.custom_reward_function.path
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"reward.custom_reward_function.path={path}: cannot be loaded ({first_line}). "
            "Name a Python file with the function of reward.custom_reward_function.name."
        ) from error

    def succeeds(row: Mapping[str, Any], solution: str, num_turns: int) -> bool:
        result: Any = function(
            data_source=row["data_source"],
            solution_str=solution,
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info={**(row.get("extra_info") or {}), "num_turns": num_turns},
        )
        if inspect.isawaitable(result):
            result = asyncio.run(_value(result))
        score, accuracy = (result["score"], result.get("acc")) if isinstance(result, dict) else (result, None)
        return is_success(score, accuracy, threshold)

    return succeeds


async def _value(awaitable: Any) -> Any:
    return await awaitable
