"""Tasks of `reasoning-gym` (Apache-2.0) as rows for verl, with a demonstration if the task has worked solutions.

An answer is scored by the task's own `score_answer`, which needs the problem's whole entry. So the entry is stored as
JSON in `extra_info`, and `compute_score` of this file is the run's reward function:

    reward.custom_reward_function.path=<this file> reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from hapo_verl.data.parquet import DataError

# Keys under which a task may keep its worked solution, in the order in which they are tried.
SOLUTIONS = ("answer_cot", "solution_cot")
_DATASETS: dict[str, Any] = {}


def dataset(task: str, *, size: int = 1, seed: int = 0) -> Any:
    """Generate a data set of `reasoning_gym`.

    Raises:
        DataError: if the package is missing or has no such task.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError("--task: reasoning-gym is not installed. pip install reasoning-gym==0.1.25") from None
    if task not in DATASETS:
        import difflib

        near = difflib.get_close_matches(task, DATASETS, n=1, cutoff=0.0)
        raise DataError(f"--task {task}: reasoning-gym has no such task. Did you mean {near[0]}?")
    return reasoning_gym.create_dataset(task, size=size, seed=seed)


def final_answer(text: str) -> str:
    """The part of a response that is scored: text after its last `####`, else its last `<answer>`, else all of it."""
    marked = re.findall(r"####[ \t]*(.+)", text)
    if marked:
        return marked[-1].strip()
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (tagged[-1] if tagged else text).strip()


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **kwargs: Any
) -> dict[str, float]:
    """A custom reward function for verl: the task's own score of the final answer; it is a success only if it is 1."""
    task = data_source.rpartition("/")[2]
    if task not in _DATASETS:
        _DATASETS[task] = dataset(task)
    entry = json.loads(extra_info["entry"])
    score = float(_DATASETS[task].score_answer(final_answer(solution_str), entry))
    return {"score": score, "acc": float(score >= 1.0)}


def rows(task: str, *, size: int, seed: int, split: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of a task, and the number of rows without a demonstration for each reason; such rows are kept.

    Args:
        task: name of a task of reasoning-gym.
        size: number of rows.
        seed: seed of the generator; use another one for held-out rows.
        split: name of the split, kept in `extra_info`.
    """
    made, without = [], Counter()
    for index, entry in enumerate(dataset(task, size=size, seed=seed)):
        row = {
            "data_source": f"reasoning_gym/{task}",
            "prompt": [{"role": "user", "content": entry["question"]}],
            "reward_model": {"style": "rule", "ground_truth": str(entry["answer"])},
            "extra_info": {"index": index, "split": split, "entry": json.dumps(entry, default=str)},
            "demonstration": None,
        }
        solution = next((entry["metadata"][key] for key in SOLUTIONS if entry["metadata"].get(key)), None)
        if solution is None:
            without["no worked solution"] += 1
        elif compute_score(row["data_source"], solution, "", row["extra_info"])["acc"] < 1.0:
            without["worked solution is no success"] += 1
        else:
            row["demonstration"] = solution.strip()
        made.append(row)
    return made, without
