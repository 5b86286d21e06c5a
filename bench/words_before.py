"""How often is the quickstart's model right before training? Strictly, and if any last number of its answer counts.

    nice python bench/words_before.py        some minutes on one core; writes results/quickstart_words/before.json

The strict reader is the reward: the last line is `#### n`. The lenient one takes the last number of an answer of up to
128 tokens, since the model explains at length. The difference is the format, which a demonstration teaches first.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "plain_loop"))
from harness import machine
from plain_loop import Policy, Settings
from word_task import WordTask

RESULTS = Path(__file__).parent / "results" / "quickstart_words"
TOKENS = 128


def last_number_is(text: str, answer: str) -> bool:
    """Whether the last number of a text is the answer."""
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return bool(numbers) and int(numbers[-1]) == int(answer)


@torch.no_grad()
def measure(policy: Policy) -> dict[str, dict[str, float]]:
    """The share of right greedy answers to each set of held-out problems, by reader."""
    found = {}
    for name, problems in policy.task.heldout.items():
        prompts = policy.encode([problem.question for problem in problems])
        texts = policy.texts(*policy.sample(*prompts, None, TOKENS))
        found[name] = {
            "strict": sum(map(policy.task.is_right, problems, texts)) / len(problems),
            "lenient": sum(last_number_is(t, p.answer) for t, p in zip(texts, problems, strict=True)) / len(problems),
            "problems": len(problems),
        }
    return found


def main() -> None:
    """Measure, write the result and print it."""
    settings = Settings(task="words")
    found = measure(Policy.of(settings, WordTask(problems=1, heldout=50, seed=1)))
    result = {"tokens": TOKENS, "success": found, "machine": machine()}
    (RESULTS / "before.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
