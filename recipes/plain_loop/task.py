"""The interface of a task for the plain loop: questions, demonstrations, and a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Problem(NamedTuple):
    """A question, its demonstration (None if there is none), and the right answer for the reward."""

    question: str
    demonstration: str | None
    answer: str


class Task(Protocol):
    """A task; `digits_task.py` is the shortest, `word_task.py` one for a language model.

    Attributes:
        train: training problems, in the order in which they are used.
        heldout: name of a metric → problems that are never trained on; the first metric is the main one.
        tokens: largest number of tokens of a response, end of sequence included.
    """

    @property
    def train(self) -> Sequence[Problem]: ...

    @property
    def heldout(self) -> Mapping[str, Sequence[Problem]]: ...

    @property
    def tokens(self) -> int: ...

    def is_right(self, problem: Problem, text: str) -> bool:
        """Whether the text is a right answer; the reward is 1 if it is, else 0."""
        ...

    def fresh_model(self) -> tuple[Any, Any]:
        """The task's own model and tokenizer, for settings without a model."""
        ...
