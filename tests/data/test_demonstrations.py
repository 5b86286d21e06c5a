"""Columns of other projects: read as they are, the shortest demonstration that a run would inject, a reason else."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from hapo_verl.algo.demonstration import Refusal
from hapo_verl.data.__main__ import main
from hapo_verl.data.demonstrations import Judge, choices, column_of
from hapo_verl.data.parquet import DataError, read_parquet, write_parquet


def judge(limit=6):
    """One token a character; a text succeeds where it ends in the row's answer."""
    return Judge(
        tokens=lambda text: [ord(char) for char in text] if len(text) <= limit else Refusal("overlong"),
        decode=lambda tokens: "".join(map(chr, tokens)),
        succeeds=lambda row, text: text.endswith(row["answer"]),
    )


def message(text, role="assistant"):
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("column", "value", "chosen"),
    [
        ("target", [message("it is 4")], Refusal("overlong")),
        ("target", [message("is 4")], "is 4"),
        ("target", [message("is 5")], Refusal("rejected")),
        ("target", None, Refusal("missing")),
        ("target", [message("?", "user"), message("is 4")], Refusal("malformed")),
        ("target_lst", [{"content": "is 5", "source": "a", "quality_score": 0.9}, {"content": "so 4"}], "so 4"),
        ("target_lst", ["thus 4", "= 4", "~ 4"], "= 4"),
        ("target_lst", ["it is not 4", "", "is 5"], Refusal("rejected")),
        ("target_lst", [], Refusal("missing")),
        ("demos", ["4", "the answer is 4"], "4"),
        ("demos", ["  ", None], Refusal("empty")),
    ],
)
def test_the_shortest_that_fits_and_succeeds_is_chosen_else_the_farthest_reason(column, value, chosen):
    assert judge().choose({"answer": "4", column: value}, column) == chosen


def test_a_column_is_found_by_its_name_and_asked_for_where_there_are_two():
    assert column_of(["prompt", "demos"], None) == "demos"
    assert column_of(["target", "target_lst"], "target_lst") == "target_lst"
    for names, asked, text in [
        (["prompt"], None, "--input: the file has none of target, target_lst, demos. Name its column"),
        (["target", "demos"], None, "--input: the file has both target and demos. Name its column"),
        (["target"], "demos", "--column demos: no such column. The file has target."),
    ]:
        with pytest.raises(DataError) as error:
            column_of(names, asked)
        assert str(error.value).startswith(text)


def test_a_reward_function_that_raises_is_named_with_the_row():
    rows = [{"answer": "4", "demos": ["4"]}, {"demos": ["4"]}]
    with pytest.raises(DataError) as error:
        list(choices(rows, "demos", judge, workers=1))
    assert str(error.value) == (
        "row 1: judging its demonstrations raised KeyError: 'answer'. "
        "Name the reward function of the run, which scores these rows: --reward."
    )


def test_processes_answer_as_one_does_and_in_order():
    rows = [{"answer": "4", "demos": ["4" * length]} for length in range(1, 40)]
    alone = list(choices(rows, "demos", partial(judge, 20), workers=1))
    assert list(choices(rows, "demos", partial(judge, 20), workers=2)) == alone
    assert alone[:20] == [row["demos"][0] for row in rows[:20]]
    assert alone[20:] == [Refusal("overlong")] * 19


def write_tokenizer(folder):
    # Not at the top: the processes of the test above import this file, and torch is not for them.
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
    import tiny_model

    tiny_model.make_tokenizer("0123456789").save_pretrained(folder)


REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert extra_info["split"] == "train"
    return {"score": -1.0, "acc": solution_str == ground_truth}
"""


def test_luffys_file_becomes_verls_with_a_report_of_what_was_left_out(tmp_path, capsys):
    rows = [
        {
            "data_source": "openr1",
            "prompt": [message("Think.", "system"), message(str(number), "user")],
            "target": [message(target)],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "12"},
            "extra_info": {"split": "train", "index": number},
        }
        for number, target in enumerate(["12", "13", "123456"])
    ]
    source, output = tmp_path / "openr1.parquet", tmp_path / "out" / "train.parquet"
    write_parquet(rows, source)
    write_tokenizer(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    command = ["demonstrations", "--input", source, "--output", output, "--tokenizer", tmp_path / "model"]
    command += ["--max-response-length", 6, "--reward", tmp_path / "reward.py", "--workers", 1]
    assert main([str(part) for part in command]) == 0

    kept = {name: value for name, value in rows[0].items() if name != "target"} | {"demonstration": "12"}
    assert list(read_parquet(output)) == [kept]
    report = output.with_suffix(".rejected.jsonl")
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        {"row": 1, "index": 1, "data_source": "openr1", "reason": "rejected"},
        {"row": 2, "index": 2, "data_source": "openr1", "reason": "overlong"},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "demonstrations are read from the column target",
        "left out        1  rejected",
        "left out        1  overlong",
        f"report    {report}",
        f"kept            1  of 3, written to {output}",
    ]


def test_a_reward_function_that_cannot_be_loaded_is_one_line(tmp_path, capsys):
    write_parquet([{"target": [message("12")]}], tmp_path / "in.parquet")
    write_tokenizer(tmp_path / "model")
    command = ["demonstrations", "--input", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet"]
    command += ["--tokenizer", tmp_path / "model", "--max-response-length", 6, "--reward", "no.py", "--workers", 1]
    assert main([str(part) for part in command]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hapo_verl.data: reward.custom_reward_function.path=no.py: cannot be loaded (")
    assert error.endswith("Name a Python file with the function of reward.custom_reward_function.name.")
    assert not (tmp_path / "out.parquet").exists()
