"""GSM8K (MIT licence): word problems whose human worked solutions become the demonstrations.

Every demonstration is scored by verl's own GSM8K reward. Rows whose demonstration is not a success are left out and
counted by reason.
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
    """Read the objects of a JSON Lines file in UTF-8, with or without a byte order mark; empty lines are skipped.

    Raises:
        DataError: if the file is missing, or a line is not UTF-8 or not a JSON object.
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
    """Parse one line; None for an empty line."""
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
        # A ValueError may also be a number with too many digits; a RecursionError comes from too deeply nested lists.
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
        raise DataError(f"not JSON ({reason}). One object a line.") from None
    if not isinstance(record, dict):
        raise DataError("not a JSON object. One object a line.")
    return record


def gsm8k_problem(record: dict[str, Any]) -> Problem | str:
    """Parse a GSM8K record, or give the reason why that fails: `no question`, `no answer` or `no #### line`.

    The calculator annotations, such as `<<48/2=24>>`, are removed: they were written for a tool, not for a reader.
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
    """Whether the value is a non-empty string that UTF-8 can encode: JSON may contain half a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)


def gsm8k_row(problem: Problem, index: int, split: str) -> dict[str, Any]:
    """A row of verl's parquet file, with the demonstration."""
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
    """The rows whose demonstration is a success, and the number of rows left out for each reason.

    Args:
        records: GSM8K's records, in order; a row's index is its position among them.
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
    """GSM8K's training records, from a JSON Lines file, or downloaded if `path` is None.

    Raises:
        DataError: if they cannot be read or downloaded.
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
