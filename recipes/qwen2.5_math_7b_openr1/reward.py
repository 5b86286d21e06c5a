"""The reward of a mathematical answer: 1 if math-verify finds it equal to the ground truth, else 0.

The text before `</think>` is not part of the answer. Needs `pip install hapo-verl[eval]`.
"""

from __future__ import annotations

from typing import Any

# Without math-verify, verl's wrapper would score every answer 0; this import fails instead.
import math_verify  # noqa: F401
from verl.utils.reward_score.math_verify import compute_score as verify

# math-verify itself gives up after 5 s. This limit is for what it cannot interrupt, and for the start of the process in
# which verl runs it: with verl's own 30 s, the first right answers on a busy machine would count as wrong.
SECONDS = 300.0


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score and accuracy, which are the same number, 0.0 or 1.0.

    Args:
        data_source: data source of the row; not used, every source is scored in the same way.
        solution_str: text of the response; the answer is in a box or is the last expression.
        ground_truth: the right answer in LaTeX, without a box.
        extra_info: not used.
    """
    answer = solution_str.rpartition("</think>")[2]
    score = float(verify(answer, ground_truth, timeout=SECONDS))
    return {"score": score, "acc": score}
