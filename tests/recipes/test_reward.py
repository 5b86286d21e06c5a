"""The reward of the mathematical recipes: the text after the thoughts is compared with the ground truth."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "qwen2.5_math_7b_openr1"))
import reward


@pytest.mark.parametrize(
    ("solution", "score"),
    [
        ("so \\boxed{0.5}", 1.0),
        ("\\boxed{3} no, wait </think> it is $\\frac{2}{4}$.", 1.0),
        ("\\boxed{\\frac12} </think> it is \\boxed{3}", 0.0),
        ("\\boxed{\\frac12} </think>", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_compared_as_mathematics_and_thoughts_are_ignored(solution, score):
    assert reward.compute_score("openr1", solution, "\\frac{1}{2}", {}) == {"score": score, "acc": score}
