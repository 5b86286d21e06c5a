"""A task of `reasoning-gym` with worked solutions as a task of the plain loop.

The demonstrator's way is long there: `gsm_symbolic`, word problems of several steps, each with a solution in prose that
ends in `#### n`. The shortest of them are taken.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import smollm2
from task import Problem

TOKENS = 160  # of a response; solutions of more characters than a quarter of them can hold are passed over


class GymTask:
    """A right last line `#### n`; SmolLM2-135M-Instruct where no model is named."""

    def __init__(self, name: str, *, problems: int, heldout: int, seed: int) -> None:
        """A task whose `train` has `problems` problems, and whose held-out split is the same for every seed."""
        import reasoning_gym

        def some(number: int, seed: int, seen: set[str]) -> list[Problem]:
            found: dict[str, Problem] = {}
            for entry in reasoning_gym.create_dataset(name, size=100 * number, seed=seed):
                solution = entry["metadata"]["answer_cot"].strip()
                if len(solution) <= 2 * TOKENS and entry["question"] not in seen:
                    found.setdefault(entry["question"], Problem(entry["question"], solution, str(entry["answer"])))
                if len(found) == number:
                    break
            return list(found.values())

        held = some(heldout, 10_000, set())
        self.heldout = {"heldout_success": held}
        self.train = some(problems, seed, {problem.question for problem in held})
        self.tokens = TOKENS

    def is_right(self, problem: Problem, text: str) -> bool:
        last = text.strip().rpartition("\n")[2].strip()
        return bool(re.fullmatch(rf"#### {re.escape(problem.answer)}", last))

    def fresh_model(self) -> tuple[Any, Any]:
        return smollm2.load()
