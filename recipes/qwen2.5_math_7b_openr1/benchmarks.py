"""Joins local parquet files with the problems and answers of benchmarks into one validation file for verl.

    python recipes/qwen2.5_math_7b_openr1/benchmarks.py --input benchmarks --train data/openr1/train.parquet \
        --output data/openr1/benchmarks.parquet

Reads `aime24`, `aime25`, `amc`, `math500`, `minerva` and `olympiadbench`, each `.parquet`, with a column `problem` or
`question` and a column `answer` or `final_answer`. A problem of AIME is sampled 32 times (avg@32), any other once.
Prompts have the same form as in training: the same system message, then the problem.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hapo_verl.data.parquet import DataError, read_parquet, write_parquet

# Benchmark → samples a problem.
BENCHMARKS = {"aime24": 32, "aime25": 32, "amc": 1, "math500": 1, "minerva": 1, "olympiadbench": 1}


def row(record: Mapping[str, Any], name: str, number: int, system: list[dict[str, str]]) -> dict[str, Any]:
    """A row of verl's parquet file; its `__rollout_n__` tells verl how often to sample it.

    Raises:
        DataError: if the record has no problem or not exactly one answer.
    """
    problem = record.get("problem") or record.get("question")
    if not isinstance(problem, str):
        raise DataError(f"{name}, row {number}: no `problem` or `question`. Rename the column.")
    answer = record.get("answer", record.get("final_answer"))
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str | int | float) or answer == "":
        raise DataError(f"{name}, row {number}: no single `answer` or `final_answer`. One answer a row.")
    return {
        "data_source": name,
        "prompt": [*system, {"role": "user", "content": problem}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(answer).strip().strip("$")},
        "extra_info": {"index": number, "split": "test"},
        "__rollout_n__": BENCHMARKS[name],
    }


def system_messages(train: Path) -> list[dict[str, str]]:
    """The system messages of the training data's first prompt.

    Raises:
        DataError: if the training data has no rows.
    """
    first = next(read_parquet(train), None)
    if first is None:
        raise DataError(f"--train {train}: no rows. Name the training data, whose system message is taken over.")
    return [message for message in first["prompt"] if message["role"] == "system"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 if every benchmark was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder with <benchmark>.parquet")
    parser.add_argument("--train", type=Path, required=True, help="training data, for its system message")
    parser.add_argument("--output", type=Path, required=True, help="parquet file")
    args = parser.parse_args(argv)
    try:
        system, rows = system_messages(args.train), []
        for name, samples in BENCHMARKS.items():
            records = list(read_parquet(args.input / f"{name}.parquet"))
            rows += [row(record, name, number, system) for number, record in enumerate(records)]
            print(f"{name:14}{len(records):6} problems, {samples} sample(s) each")
        write_parquet(rows, args.output)
    except DataError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
