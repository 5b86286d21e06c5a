"""Digits backwards as a task of the plain loop: the quickstart's digits, and a detour that its demonstrator may take.

With a `detour` of D the demonstration writes D dots first. Dots earn nothing, and each question has a length limit of
its own, 0 to D dots above the answer: the demonstration's way is right where it fits, no dots are right everywhere.
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
    """Exact match; a tiny random Qwen2 model of its own where none is given."""

    def __init__(self, *, length: int, detour: int, hidden: int, problems: int, heldout: int, seed: int) -> None:
        """A task whose `train` has `problems` questions, with replacement."""
        self._detour, self._hidden, self._seed = detour, hidden, seed
        self._alphabet = "0123456789" + ("." if detour else "")
        self.tokens = length + detour + 1
        asked, held = digits.problems(length, problems, heldout, seed)
        self.train = list(map(self.problem, asked))
        self.heldout = {"heldout_success": list(map(self.problem, held))}

    def problem(self, question: str) -> Problem:
        """The problem of a digit string, with the demonstrator's answer."""
        return Problem(question, "." * self._detour + question[::-1], question[::-1])

    def is_right(self, problem: Problem, text: str) -> bool:
        """The answer, and no more dots before it than this question allows."""
        dots = len(text) - len(text.lstrip("."))
        return text[dots:] == problem.answer and dots <= crc32(problem.question.encode()) % (self._detour + 1)

    def fresh_model(self) -> tuple[Any, Any]:
        """Model and tokenizer, where the settings name none."""
        tokenizer = tiny_model.make_tokenizer(self._alphabet)
        return tiny_model.make_model(tokenizer, hidden=self._hidden, layers=2, seed=self._seed), tokenizer
