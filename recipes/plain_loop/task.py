"""What the plain loop is given to learn: questions, what is right, and how a demonstrator would answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Problem(NamedTuple):
    """A question, the demonstrator's answer to it (None where there is none) and what the reward compares with."""

    question: str
    demonstration: str | None
    answer: str


class Task(Protocol):
    """A task; `digits_task.py` is the shortest, `word_task.py` one for a language model.

    Attributes:
        train: problems in the order in which they are asked.
        heldout: problems that are never trained on, by the name of their metric; the first is the one that counts.
        tokens: the longest response, its end of sequence included.
    """

    @property
    def train(self) -> Sequence[Problem]: ...

    @property
    def heldout(self) -> Mapping[str, Sequence[Problem]]: ...

    @property
    def tokens(self) -> int: ...

    def is_right(self, problem: Problem, text: str) -> bool:
        """The reward: 1 for True."""
        ...

    def fresh_model(self) -> tuple[Any, Any]:
        """Model and tokenizer, where the settings name none."""
        ...
