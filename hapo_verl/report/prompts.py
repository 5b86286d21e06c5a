"""Collects the history of each prompt, and counts of each step's groups, from a trace.

A prompt is of one of these kinds:

never solved         none of its groups had a success
helped, then solved  a demonstration was injected before its first success, which came in a later step
fell back            one of its groups had a success, but the last one had none
other                anything else

A trace may have millions of lines. They are read once; the memory grows only with the numbers of prompts and steps.
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
    """The history of one prompt.

    Attributes:
        name: its data source and index.
        visits: number of its groups.
        first: step of its first group.
        last: step of its last group.
        rates: success rates of its first, its best and its last group.
        injected: number of its groups with an injected demonstration.
        helped_at: step of the first injection before any success; None if there was none.
        solved_at: first step with a success; None if there was none.
        traced: the visits whose rows were traced.
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
        """Add the prompt's next group; groups must come in the order of their steps."""
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
        """The kind of the prompt: `never solved`, `fell back`, `helped, then solved` or `other`."""
        if self.solved_at is None:
            return "never solved"
        if not self.rates[2]:
            return "fell back"
        return "helped, then solved" if self.helped_at is not None else "other"


@dataclass
class Groups:
    """Counts of the groups of a run, and the histories of its prompts.

    Attributes:
        successes: (step, success count) → number of groups.
        fired: (step, success count) → number of groups in which the gate fired.
        outcomes: (step, outcome) → number of groups.
        rollouts: largest number of rollouts of a group.
        stories: (data source, index) → history of the prompt.
    """

    successes: Counter[tuple[int, int]] = field(default_factory=Counter)
    fired: Counter[tuple[int, int]] = field(default_factory=Counter)
    outcomes: Counter[tuple[int, str]] = field(default_factory=Counter)
    rollouts: int = 0
    stories: dict[tuple[Any, Any], Story] = field(default_factory=dict)


def of_groups(lines: Iterable[Mapping[str, Any]], traced: Collection[str] = ()) -> Groups:
    """Collect counts and histories from the groups of a trace.

    Args:
        lines: the groups' lines of the trace, in the order of the steps.
        traced: uids of the groups whose rows were traced.
    """
    found = Groups()
    for line in lines:
        step, outcome, won = line["step"], line["outcome"], line["successes"]
        found.outcomes[step, outcome] += 1
        if not won:
            continue  # the gate was not applied to this group
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
