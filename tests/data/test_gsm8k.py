"""GSM8K: which rows are kept or left out, with reasons, and one line for an unreadable file."""

import json

import pandas
import pytest

from hapo_verl.data.__main__ import main
from hapo_verl.data.gsm8k import Problem, gsm8k_problem, read_jsonl, verified_rows
from hapo_verl.data.parquet import DataError
from hapo_verl.rollout.reward import default_score

EGGS = {"question": "Two eggs and 1,232 more?", "answer": "2 + 1232 = <<2+1232=1234>>1,234 eggs.\n#### 1,234"}


def test_the_demonstration_is_the_human_solution_without_the_calculators_notes():
    assert gsm8k_problem(EGGS) == Problem(
        question="Two eggs and 1,232 more?", demonstration="2 + 1232 = 1,234 eggs.\n#### 1,234", answer="1234"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": " "}, "no question"),
        ({"question": None}, "no question"),
        ({"answer": ""}, "no answer"),
        ({"answer": "it is 4"}, "no #### line"),
        # Half of a surrogate pair cannot be encoded in UTF-8.
        ({"question": "\ud800?"}, "no question"),
        ({"answer": "\udc00 #### 4"}, "no answer"),
    ],
)
def test_a_record_without_question_or_answer_is_left_out_with_its_reason(change, reason):
    assert gsm8k_problem(EGGS | change) == reason


def test_a_row_is_kept_only_if_verls_own_reward_calls_its_demonstration_a_success():
    wrong = EGGS | {"answer": "no idea\n#### twelve"}
    rows, left_out = verified_rows([EGGS, wrong, {"question": "?"}], default_score, split="train")
    assert left_out == {"demonstration is no success": 1, "no answer": 1}
    assert [row["extra_info"] for row in rows] == [{"index": 0, "split": "train"}]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "1234"}
    assert rows[0]["prompt"][0]["content"].startswith("Two eggs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n{", "line 2: not JSON (Expecting property name enclosed in double quotes). One object a line."),
        ("[1]\n", "line 1: not a JSON object. One object a line."),
        # Found by tests/fuzz.
        (
            "1" * 5000,
            "line 1: not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits). One object a line.",
        ),
        (
            "[" * 100_000,
            "line 1: not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string). One object a line.",
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_named_by_its_number(tmp_path, text, message):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_jsonl(path))
    assert str(error.value) == f"--input {path}, {message}"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"question": "1?"}\n{"question": "caf\u00e9?"}\n'.encode("latin-1"),
            "line 2: not UTF-8 (byte 0xe9 at position 17). JSON lines are UTF-8; convert the file: iconv -f LATIN1 -t UTF-8, with the encoding that it has.",
        ),
        (
            '{"question": "1?"}\n'.encode("utf-16"),
            "line 1: not UTF-8 (byte 0xff at position 0). JSON lines are UTF-8; convert the file: iconv -f UTF-16 -t UTF-8, with the encoding that it has.",
        ),
    ],
)
def test_a_line_that_is_not_utf8_is_named_with_the_way_to_convert_it(tmp_path, capsys, content, problem):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert main(["gsm8k", "--input", str(path), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"hapo_verl.data: --input {path}, {problem}"


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes('{"question": "caf\u00e9?"}\r\n\r\n{"question": "2?"}'.encode("utf-8-sig"))
    assert list(read_jsonl(path)) == [{"question": "caf\u00e9?"}, {"question": "2?"}]


def test_a_missing_file_is_one_line_and_exit_code_one(tmp_path, capsys):
    assert main(["gsm8k", "--input", str(tmp_path / "no.jsonl"), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"hapo_verl.data: --input {tmp_path / 'no.jsonl'}: no such file. "
        "Give GSM8K as JSON lines with `question` and `answer`."
    )


def test_the_command_writes_verls_parquet_with_demonstrations_and_reports_counts(tmp_path, capsys):
    source = tmp_path / "train.jsonl"
    source.write_text(json.dumps(EGGS) + "\n\n" + json.dumps({"question": "?", "answer": "4"}) + "\n")
    assert main(["gsm8k", "--input", str(source), "--output", str(tmp_path / "out")]) == 0
    rows = pandas.read_parquet(tmp_path / "out" / "train.parquet")
    assert rows["demonstration"].tolist() == ["2 + 1232 = 1,234 eggs.\n#### 1,234"]
    assert rows["data_source"].tolist() == ["openai/gsm8k"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "left out           1  no #### line",
        f"kept               1  of 2, written to {tmp_path / 'out' / 'train.parquet'}",
    ]
