"""A task of the plain loop with problems and worked solutions of `reasoning-gym`.

It is meant for `gsm_symbolic`: word problems of several steps, each with a solution in prose that ends in `#### n`. The
demonstrations are long, so only problems with short solutions are used.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import smollm2
from task import Problem

TOKENS = 160  # of a response; a solution with more than twice as many characters is not used


class GymTask:
    """Problems rewarded for a right last line `#### n`; its own model is SmolLM2-135M-Instruct."""

    def __init__(self, name: str, *, problems: int, heldout: int, seed: int) -> None:
        """Make `problems` training problems; the `heldout` held-out ones are the same for every seed."""
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
