"""verl's built-in reward functions, for tools that verify a data set."""

from __future__ import annotations


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
