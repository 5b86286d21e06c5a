"""Word problems: a task that a small instruct model can nearly do, but on which GRPO never sees a success.

A question is a story with one to three steps of arithmetic. Only an answer whose last line is exactly `#### n`, with
the right number, is rewarded. A model that was not told so never writes that line. So all rollouts of a group fail, and
GRPO's advantages are all 0. The demonstration has one line for each step of the calculation, and then the last line.
SmolLM2-135M-Instruct finds most results of these sums if it is given the lines up to them (`bench/words_before.py`).

    python recipes/quickstart/word_problems.py --output DIR      writes DIR/{train,heldout,new_templates}.parquet

There are two sets of held-out problems: new stories from the templates of the training data (`heldout`), and stories
from templates that are never trained on (`new_templates`).
"""

import argparse
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DATA_SOURCE = "word_problems"
# Limits in SmolLM2's tokens; the longest demonstration has 34, end of sequence included.
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 40

NAMES = (
    "Tom", "Ann", "Li", "Sara", "Omar", "Maya", "Ivan", "Zoe", "Raj", "Nora", "Ben", "Aiko",
    "Luis", "Emma", "Paul", "Fatima", "Jack", "Elena", "Max", "Grace",
)  # fmt: skip
THINGS = (
    "apples", "pens", "coins", "cards", "books", "shells", "marbles", "stamps", "cups", "eggs",
    "stickers", "buttons", "beads", "tickets", "balls", "plums", "candles", "stones",
)  # fmt: skip
BOXES = ("boxes", "bags", "baskets", "crates", "jars", "packs")


class Problem(NamedTuple):
    """A question, its worked solution, and the number at the end of the solution."""

    question: str
    demonstration: str
    answer: str


def sums(*steps: tuple[int, str, int]) -> tuple[list[str], int]:
    """The lines of a solution and its result: each step is (left, operator, right)."""
    lines, result = [], 0
    for left, operator, right in steps:
        result = {"+": left + right, "-": left - right, "x": left * right}[operator]
        lines.append(f"{left} {operator} {right} = {result}")
    return lines, result


# Each template draws its numbers and returns the story and the steps, each as (left, operator, right).
def finds_more(rng, name, things, box):
    a, b = rng.randint(2, 20), rng.randint(2, 9)
    return f"{name} has {a} {things} and finds {b} more. How many {things} does {name} have?", [(a, "+", b)]


def gives_away(rng, name, things, box):
    a, b = rng.randint(5, 12), rng.randint(2, 4)
    return f"{name} has {a} {things} and gives {b} away. How many {things} are left?", [(a, "-", b)]


def boxes(rng, name, things, box):
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"{name} has {a} {box} with {b} {things} each. How many {things} is that?", [(a, "x", b)]


def boxes_and_more(rng, name, things, box):
    a, b, c = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9)
    story = f"{name} has {a} {box} with {b} {things} each and finds {c} more. How many {things} does {name} have?"
    return story, [(a, "x", b), (a * b, "+", c)]


def days(rng, name, things, box):
    a, b, c = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9)
    story = f"{name} has {c} {things} and makes {a} more a day for {b} days. How many {things} does {name} have then?"
    return story, [(a, "x", b), (a * b, "+", c)]


def two_colours(rng, name, things, box):
    a, b, c = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 9)
    story = f"{name} buys {a} red and {b} blue {things}. Each of them costs {c} coins. How many coins does {name} pay?"
    return story, [(a, "+", b), (a + b, "x", c)]


def loses_boxes(rng, name, things, box):
    a, b, c = rng.randint(5, 9), rng.randint(2, 4), rng.randint(2, 9)
    story = f"{name} has {a} {box} with {c} {things} each and loses {b} {box}. How many {things} are left?"
    return story, [(a, "-", b), (a - b, "x", c)]


def boxes_of_boxes(rng, name, things, box):
    a, b, c = rng.randint(2, 4), rng.randint(2, 4), rng.randint(2, 5)
    story = f"{name} has {a} chests. In each are {b} {box} with {c} {things} each. How many {things} is that in all?"
    return story, [(a, "x", b), (a * b, "x", c)]


def three_steps(rng, name, things, box):
    a, b, c, d = rng.randint(2, 4), rng.randint(2, 4), rng.randint(2, 5), rng.randint(2, 9)
    story = (
        f"{name} packs {a} green and {b} brown {box} with {c} {things} each. {d} {things} do not fit. "
        f"How many {things} are there?"
    )
    return story, [(a, "+", b), (a + b, "x", c), ((a + b) * c, "+", d)]


def shelves(rng, name, things, box):
    a, b, c = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9)
    story = f"A shop has {a} rows of {b} {things} and {c} {things} on the floor. How many {things} is that in all?"
    return story, [(a, "x", b), (a * b, "+", c)]


def friends(rng, name, things, box):
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    story = (
        f"{name} has {a} {things}, a friend has {b} and another friend has {c}. "
        f"How many {things} do they have together?"
    )
    return story, [(a, "+", b), (a + b, "+", c)]


Template = Callable[[random.Random, str, str, str], tuple[str, list[tuple[int, str, int]]]]
TEMPLATES: tuple[Template, ...] = (
    finds_more, gives_away, boxes, boxes_and_more, days, two_colours, loses_boxes, boxes_of_boxes, three_steps,
)  # fmt: skip
NEW_TEMPLATES: tuple[Template, ...] = (shelves, friends)


def problem(rng: random.Random, templates: tuple[Template, ...]) -> Problem:
    """Make a problem from a random template."""
    story, steps = rng.choice(templates)(rng, rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES))
    lines, result = sums(*steps)
    return Problem(story, "\n".join([*lines, f"#### {result}"]), str(result))


def is_right(text: str, answer: str) -> bool:
    """Whether the last line is `#### n` with the right number."""
    return bool(re.fullmatch(rf"#### {re.escape(answer)}", text.strip().rpartition("\n")[2].strip()))


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """The reward function for verl: 1 for a right last line, 0 for everything else."""
    success = float(is_right(solution_str, ground_truth))
    return {"score": success, "acc": success}


def splits(*, train: int, heldout: int, seed: int) -> dict[str, list[Problem]]:
    """Training problems and two held-out sets: `heldout`, from the same templates, and `new_templates`.

    The held-out problems are the same for every seed, and no training problem is among them.
    """
    rng = random.Random("held out")
    held = {
        name: _distinct(rng, of, heldout, set())
        for name, of in (("heldout", TEMPLATES), ("new_templates", NEW_TEMPLATES))
    }
    seen = {problem.question for problems in held.values() for problem in problems}
    return {"train": _distinct(random.Random(f"train {seed}"), TEMPLATES, train, seen), **held}


def _distinct(rng: random.Random, templates: tuple[Template, ...], number: int, seen: set[str]) -> list[Problem]:
    """Make `number` problems with distinct questions, none of which is in `seen`."""
    found: dict[str, Problem] = {}
    while len(found) < number:
        new = problem(rng, templates)
        if new.question not in seen:
            found.setdefault(new.question, new)
    return list(found.values())


def row(problem: Problem, index: int, split: str) -> dict:
    """A row in verl's format, with the demonstration."""
    return {
        "data_source": DATA_SOURCE if split == "train" else f"{DATA_SOURCE}_{split}",
        "prompt": [{"role": "user", "content": problem.question}],
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": index, "split": split},
        "demonstration": problem.demonstration,
    }


def write(output: Path, *, train: int, heldout: int, seed: int) -> None:
    """Write `train.parquet`, `heldout.parquet` and `new_templates.parquet` into the folder `output`."""
    import pandas

    output.mkdir(parents=True, exist_ok=True)
    for split, problems in splits(train=train, heldout=heldout, seed=seed).items():
        rows = [row(problem, index, split) for index, problem in enumerate(problems)]
        pandas.DataFrame(rows).to_parquet(output / f"{split}.parquet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=4096)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    write(**vars(parser.parse_args()))
