"""Checks of reward values, and verl's or a launch's reward function for tools that verify a data set."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_verl.algo.injection import is_success
from hapo_verl.config import ConfigError

# (row of the parquet file, text of the response including tools' answers, its `num_turns`) → whether it is a success
Succeeds = Callable[[Mapping[str, Any], str, int], bool]


class RewardError(ValueError):
    """Raised if a reward function returns no valid reward; the message is one line: what, the rule, the fix."""


def finite_number(value: Any, name: str) -> float:
    """Convert a score to a float; a tensor or array with a single element is accepted.

    Args:
        value: the value that the reward function returned.
        name: name of the value, `score` or `acc`.

    Raises:
        RewardError: if it is not a number or not finite, since then the whole group would have no valid advantages.
    """
    number = value
    if not isinstance(number, numbers.Real) and getattr(number, "size", None) is not None:
        count = number.numel() if hasattr(number, "numel") else number.size
        number = number.item() if count == 1 else value
    if isinstance(number, numbers.Real) and math.isfinite(number):
        return float(number)
    raise RewardError(
        f"the reward function returned {name}={value!r} ({type(value).__name__}): a finite number is needed. "
        "Return a float, or a dict with one under score."
    )


def default_score(data_source: str, solution: str, ground_truth: str) -> float:
    """The score that verl's default reward function gives a solution.

    Args:
        data_source: the row's `data_source`, by which verl chooses the function.
        solution: the response's text.
        ground_truth: the row's `reward_model.ground_truth`.
    """
    from verl.utils.reward_score import default_compute_score

    result = default_compute_score(data_source, solution, ground_truth)
    return float(result["score"] if isinstance(result, dict) else result)


def reward_of(path: str | None, name: str = "compute_score") -> DictConfig:
    """The part of a launch's configuration that names its reward function.

    Args:
        path: `reward.custom_reward_function.path`; None for verl's own functions, chosen by `data_source`.
        name: `reward.custom_reward_function.name`.
    """
    return OmegaConf.create({"reward": {"custom_reward_function": {"path": path, "name": name}}})


def success_of(config: DictConfig, threshold: float) -> Succeeds:
    """A function that decides by a launch's reward function whether a response is a success.

    Args:
        config: the whole configuration of a launch, or the result of `reward_of`.
        threshold: `hapo.success_threshold`.

    Raises:
        ConfigError: if the reward function cannot be loaded.
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
        if isinstance(result, dict) and "score" not in result:
            raise RewardError(f"the reward function returned a dict without score, with {', '.join(result)}. Add it.")
        score, accuracy = (result["score"], result.get("acc")) if isinstance(result, dict) else (result, None)
        accuracy = None if accuracy is None else finite_number(accuracy, "acc")
        return is_success(finite_number(score, "score"), accuracy, threshold)

    return succeeds


async def _value(awaitable: Any) -> Any:
    return await awaitable
