"""GSM8K (MIT licence): word problems with worked solutions by humans, which are the demonstrations.

Every row's demonstration is scored by verl's own GSM8K reward; a row whose demonstration is no success is left out,
counted and named.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from hapo_verl.data.parquet import DataError

GSM8K = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


@dataclass(frozen=True)
class Problem:
    """A GSM8K problem.

    Attributes:
        question: the word problem.
        demonstration: the worked solution, ending in `#### answer`.
        answer: the number, without separators.
    """

    question: str
    demonstration: str
    answer: str


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file in UTF-8, with or without a byte order mark; empty lines are passed over.

    Raises:
        DataError: when the file is missing, or a line is not UTF-8 or not a JSON object.
    """
    if not path.is_file():
        raise DataError(f"--input {path}: no such file. Give GSM8K as JSON lines with `question` and `answer`.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = _json_object(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
            except DataError as error:
                raise DataError(f"--input {path}, line {number}: {error}") from None
            if record is not None:
                yield record


def _json_object(line: bytes) -> dict[str, Any] | None:
    """The object that a line is; None for an empty line."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "LATIN1"
        raise DataError(
            f"not UTF-8 (byte {line[error.start]:#04x} at position {error.start}). JSON lines are UTF-8; convert the "
            f"file: iconv -f {encoding} -t UTF-8, with the encoding that it has."
        ) from None
    if not text:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Also a number of too many digits, and lists in lists beyond what Python can follow.
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
        raise DataError(f"not JSON ({reason}). One object a line.") from None
    if not isinstance(record, dict):
        raise DataError("not a JSON object. One object a line.")
    return record


def gsm8k_problem(record: dict[str, Any]) -> Problem | str:
    """The problem of a GSM8K record, or why there is none: `no question`, `no answer` or `no #### line`.

    The calculator annotations `<<48/2=24>>` are removed: they were written for a tool, not for a reader.
    """
    question, solution = record.get("question"), record.get("answer")
    if not _is_text(question):
        return "no question"
    if not _is_text(solution):
        return "no answer"
    answer = re.search(r"####\s*(\S+)\s*$", solution)
    if answer is None:
        return "no #### line"
    demonstration = re.sub(r"<<[^>]*>>", "", solution).strip()
    return Problem(question.strip(), demonstration, answer[1].replace(",", "").replace("$", ""))


def _is_text(value: Any) -> TypeGuard[str]:
    """A string with something in it, of whole characters: JSON may spell half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)


def gsm8k_row(problem: Problem, index: int, split: str) -> dict[str, Any]:
    """A row of verl's parquet with the demonstration."""
    return {
        "data_source": GSM8K,
        "prompt": [{"role": "user", "content": f"{problem.question} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": index, "split": split},
        "demonstration": problem.demonstration,
    }


def verified_rows(
    records: Iterable[dict[str, Any]], score: Callable[[str, str, str], float], *, split: str
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows whose demonstration is a success, and how many were left out for which reason.

    Args:
        records: GSM8K's, in order; a row's index is its position among them.
        score: (data source, solution, ground truth) → score; 1 is a success.
        split: name of the split, kept in `extra_info`.
    """
    rows, left_out = [], Counter()
    for index, record in enumerate(records):
        problem = gsm8k_problem(record)
        if isinstance(problem, str):
            left_out[problem] += 1
        elif score(GSM8K, problem.demonstration, problem.answer) < 1.0:
            left_out["demonstration is no success"] += 1
        else:
            rows.append(gsm8k_row(problem, index, split))
    return rows, left_out


def gsm8k_records(path: Path | None) -> Iterable[dict[str, Any]]:
    """GSM8K's training records: of a JSON Lines file, or fetched where there is none.

    Raises:
        DataError: when they cannot be had.
    """
    if path is not None:
        return list(read_jsonl(path))
    import datasets

    try:
        return datasets.load_dataset(GSM8K, "main", split="train").to_list()
    except Exception as error:
        raise DataError(
            f"{GSM8K}: cannot be fetched ({type(error).__name__}). Give its JSON lines: --input train.jsonl, "
            "or GSM8K=train.jsonl to make."
        ) from None
