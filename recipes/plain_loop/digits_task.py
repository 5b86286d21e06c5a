"""A task of the plain loop: reverse a string of digits, as in the quickstart, with an optional detour.

With a `detour` of D the demonstration writes D dots before the answer. The dots are useless, and each question allows
only a certain number of them, between 0 and D. So the demonstration is right only for questions that allow D dots,
while the answer without dots is always right.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import digits
import tiny_model
from task import Problem


class DigitsTask:
    """Reverse a string of digits, rewarded by exact match; its own model is a tiny random Qwen2."""

    def __init__(self, *, length: int, detour: int, hidden: int, problems: int, heldout: int, seed: int) -> None:
        """Make `problems` training questions, drawn with replacement, and `heldout` held-out ones.

        Args:
            length: digits of a question.
            detour: dots that the demonstration writes first.
            hidden: hidden size of the task's own model.
            problems: number of training questions.
            heldout: number of held-out questions.
            seed: seed of questions and model.
        """
        self._detour, self._hidden, self._seed = detour, hidden, seed
        self._alphabet = "0123456789" + ("." if detour else "")
        self.tokens = length + detour + 1
        asked, held = digits.problems(length, problems, heldout, seed)
        self.train = list(map(self.problem, asked))
        self.heldout = {"heldout_success": list(map(self.problem, held))}

    def problem(self, question: str) -> Problem:
        """The problem for a string of digits, with its demonstration."""
        return Problem(question, "." * self._detour + question[::-1], question[::-1])

    def is_right(self, problem: Problem, text: str) -> bool:
        """Whether the text is the answer, after no more dots than this question allows."""
        dots = len(text) - len(text.lstrip("."))
        return text[dots:] == problem.answer and dots <= crc32(problem.question.encode()) % (self._detour + 1)

    def fresh_model(self) -> tuple[Any, Any]:
        """Make the task's own model and tokenizer."""
        tokenizer = tiny_model.make_tokenizer(self._alphabet)
        return tiny_model.make_model(tokenizer, hidden=self._hidden, layers=2, seed=self._seed), tokenizer
