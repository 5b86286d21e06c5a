"""The reward of a mathematical answer: 1 where math-verify finds it equal to the ground truth, else 0.

What a model thinks before `</think>` is not its answer. Needs `pip install hapo-verl[eval]`.
"""

from __future__ import annotations

from typing import Any

# verl's wrapper scores every answer 0 where math-verify is missing; this line fails instead.
import math_verify  # noqa: F401
from verl.utils.reward_score.math_verify import compute_score as verify

# math-verify gives up after 5 s by itself. This is for what it cannot interrupt, and for the start of the process that
# verl runs it in: with verl's own 30 s, the first right answers on a busy machine would count as wrong.
SECONDS = 300.0


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score and accuracy, which are the same number, 0.0 or 1.0.

    Args:
        data_source: of the row; every source is scored alike.
        solution_str: the response's text; the answer stands in a box or as the last expression.
        ground_truth: in LaTeX, without a box.
        extra_info: of the row; not read.
    """
    answer = solution_str.rpartition("</think>")[2]
    score = float(verify(answer, ground_truth, timeout=SECONDS))
    return {"score": score, "acc": score}
