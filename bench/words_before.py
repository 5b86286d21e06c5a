"""What can the quickstart's model do before training?

    nice python bench/words_before.py        some minutes on one core; writes results/quickstart_words/before.json

strict     right greedy answers, as the reward reads them: the last line is `#### n`
lenient    answers of up to 128 tokens whose last number is right, in whatever words
sums       results in the demonstrations' lines `a + b = c` that the model finds, given the lines before and `a + b =`
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "plain_loop"))
from harness import machine
from plain_loop import Policy, Settings
from task import Problem
from word_task import WordTask

RESULTS = Path(__file__).parent / "results" / "quickstart_words"
TOKENS = 128


def last_number_is(text: str, answer: str) -> bool:
    """Whether the last number of a text is the answer."""
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return bool(numbers) and int(numbers[-1]) == int(answer)


@torch.no_grad()
def sums(policy: Policy, problems: Sequence[Problem]) -> float:
    """The share of results in the demonstrations that are the model's own greedy tokens, given everything before."""
    right = []
    for problem in problems:
        rows = policy.demonstration_rows([problem])
        best = policy.log_probabilities(rows)[0].argmax(-1).tolist()
        within = False
        for token, greedy in zip(rows.response_BT[0].tolist(), best, strict=True):
            text = policy.tokenizer.decode([token])
            if within and any(digit in text for digit in "0123456789"):
                right[-1] = right[-1] and token == greedy
            elif "=" in text:
                within = True
                right.append(True)
            elif text.strip(" ") or "\n" in text:
                within = False
    return sum(right) / len(right)


@torch.no_grad()
def measure(policy: Policy) -> dict[str, dict[str, float]]:
    """The three shares for each set of held-out problems."""
    found = {}
    for name, problems in policy.task.heldout.items():
        prompts = policy.encode([problem.question for problem in problems])
        texts = policy.texts(*policy.sample(*prompts, None, TOKENS))
        found[name] = {
            "strict": sum(map(policy.task.is_right, problems, texts)) / len(problems),
            "lenient": sum(last_number_is(t, p.answer) for t, p in zip(texts, problems, strict=True)) / len(problems),
            "sums": sums(policy, problems),
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
