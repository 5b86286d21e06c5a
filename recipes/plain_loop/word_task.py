"""A task of the plain loop: the word problems of the quickstart, for any Hugging Face instruct model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import smollm2
import word_problems
from task import Problem


class WordTask:
    """Word problems rewarded for a right last line `#### n`; its own model is SmolLM2-135M-Instruct."""

    def __init__(self, *, problems: int, heldout: int, seed: int) -> None:
        """Make `problems` training problems, and `heldout` problems for each held-out set."""
        splits = word_problems.splits(train=problems, heldout=heldout, seed=seed)
        self.train, self.heldout = (
            list(map(_problem, splits["train"])),
            {
                "heldout_success": list(map(_problem, splits["heldout"])),
                "new_templates_success": list(map(_problem, splits["new_templates"])),
            },
        )
        self.tokens = word_problems.RESPONSE_TOKENS

    def is_right(self, problem: Problem, text: str) -> bool:
        return word_problems.is_right(text, problem.answer)

    def fresh_model(self) -> tuple[Any, Any]:
        return smollm2.load()


def _problem(problem: word_problems.Problem) -> Problem:
    return Problem(problem.question, problem.demonstration, problem.answer)
