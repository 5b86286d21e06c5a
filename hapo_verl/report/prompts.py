"""What became of each prompt, and of each step's groups, from the lines that a trace has of them.

never solved        no group of it had a success
helped, then solved  it had no success up to a step in which it was injected, and one in a later step
fell back           a group of it had a success, and the last one had none

A trace may have millions of lines: they are read once, and what is kept grows with prompts and steps alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Visit(NamedTuple):
    """A group of a prompt whose rows were traced."""

    step: int
    uid: str
    successes: int
    rollouts: int
    outcome: str


@dataclass
class Story:
    """Of a prompt.

    Attributes:
        name: its data source and index.
        visits: groups of it.
        first: step of the first one.
        last: step of the last one.
        rates: success rate of the first, the best and the last.
        injected: steps in which a demonstration was injected: how many.
        helped_at: first step in which one was injected while there had been no success.
        solved_at: first step with a success.
        traced: groups whose rows were traced.
    """

    name: tuple[Any, Any]
    visits: int = 0
    first: int = 0
    last: int = 0
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)
    injected: int = 0
    helped_at: int | None = None
    solved_at: int | None = None
    traced: list[Visit] = field(default_factory=list)

    def see(self, step: int, successes: int, rollouts: int, *, injected: bool) -> None:
        """The next group, in the order of the steps."""
        rate = successes / rollouts
        if not self.visits:
            self.first, self.rates = step, (rate, rate, rate)
        self.visits, self.last = self.visits + 1, step
        self.rates = (self.rates[0], max(self.rates[1], rate), rate)
        if successes and self.solved_at is None:
            self.solved_at = step
        if injected:
            self.injected += 1
            if self.solved_at is None and self.helped_at is None:
                self.helped_at = step

    @property
    def kind(self) -> str:
        """`never solved`, `fell back`, `helped, then solved`, or nothing of these."""
        if self.solved_at is None:
            return "never solved"
        if not self.rates[2]:
            return "fell back"
        return "helped, then solved" if self.helped_at is not None else "other"


@dataclass
class Groups:
    """Of a run.

    Attributes:
        successes: (step, success count) → groups.
        fired: the same, those in which the gate fired.
        outcomes: (step, outcome) → groups.
        rollouts: the most that a group had.
        stories: of each prompt, by data source and index.
    """

    successes: Counter[tuple[int, int]] = field(default_factory=Counter)
    fired: Counter[tuple[int, int]] = field(default_factory=Counter)
    outcomes: Counter[tuple[int, str]] = field(default_factory=Counter)
    rollouts: int = 0
    stories: dict[tuple[Any, Any], Story] = field(default_factory=dict)


def of_groups(lines: Iterable[Mapping[str, Any]], traced: Collection[str] = ()) -> Groups:
    """What became of prompts and groups.

    Args:
        lines: of the trace, in the order of the steps.
        traced: uids of the groups whose rows were traced.
    """
    found = Groups()
    for line in lines:
        step, outcome, won = line["step"], line["outcome"], line["successes"]
        found.outcomes[step, outcome] += 1
        if not won:
            continue  # nothing to judge
        successes, rollouts = sum(won), len(won)
        found.rollouts = max(found.rollouts, rollouts)
        found.successes[step, successes] += 1
        found.fired[step, successes] += bool(line["fired"])
        name = (line.get("data_source"), line["index"])
        story = found.stories.setdefault(name, Story(name))
        story.see(step, successes, rollouts, injected=outcome == "injected")
        if line["uid"] in traced:
            story.traced.append(Visit(step, line["uid"], successes, rollouts, outcome))
    return found
