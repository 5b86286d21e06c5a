"""Other projects' columns: the shortest demonstration that a run would inject is chosen, or a reason is given."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from hapo_verl.algo.demonstration import Refusal, Response, demonstration_turns
from hapo_verl.data.__main__ import main
from hapo_verl.data.demonstrations import Judge, choices, column_of, verified
from hapo_verl.data.parquet import DataError, read_parquet, write_parquet


def judge(limit=6):
    """A judge with one token per character; a text succeeds if it ends in the answer and has the right turns."""

    def respond(value, row):
        turns = demonstration_turns(value)
        if isinstance(turns, Refusal):
            return turns
        text = "".join(turn.text + "".join(turn.answers) for turn in turns)
        tokens = [ord(char) for char in text]
        return Response(tokens, [1] * len(tokens), len(turns)) if len(text) <= limit else Refusal("overlong")

    return Judge(
        respond=respond,
        decode=lambda tokens: "".join(map(chr, tokens)),
        succeeds=lambda row, text, num_turns: text.endswith(row["answer"]) and num_turns == row.get("num_turns", 2),
    )


def message(text, role="assistant"):
    return {"role": role, "content": text}


CALLED = [message("?"), message("3", "tool"), message("= 4")]


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
        ("demos", "is 4", "is 4"),
        ("demos", 4, Refusal("malformed")),
        ("target", False, Refusal("malformed")),
        ("target", [message("?", "tool"), message("is 4")], Refusal("malformed")),
    ],
)
def test_the_shortest_success_that_fits_is_chosen_else_the_best_failures_reason(column, value, chosen):
    assert judge().choose({"answer": "4", column: value}, column) == chosen


@pytest.mark.parametrize(
    ("column", "value", "chosen"),
    [
        ("target", CALLED, CALLED),
        ("target_lst", [CALLED, {"content": "4"}], CALLED),  # The row's answer needs a tool call.
        (
            "demos",
            [CALLED, [message("?"), message("", "tool"), message("4")]],
            [message("?"), message("", "tool"), message("4")],
        ),
    ],
)
def test_messages_with_calls_stay_messages(column, value, chosen):
    assert judge().choose({"answer": "4", "num_turns": 4, column: value}, column) == chosen


def test_if_one_row_keeps_messages_all_rows_do():
    rows = [{"demos": [CALLED]}, {"demos": ["4"]}, {"demos": None}]
    kept, rejected = verified(rows, [CALLED, "4", Refusal("missing")], "demos")
    assert [row["demonstration"] for row in kept] == [CALLED, [message("4")], None]
    assert [line["row"] for line in rejected] == [2]
    assert [row["demonstration"] for row in verified(rows[1:2], ["4"], "demos")[0]] == ["4"]


def test_a_column_is_found_by_its_name_and_two_are_an_error():
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


def test_several_processes_give_the_results_of_one_in_order():
    rows = [{"answer": "4", "demos": ["4" * length]} for length in range(1, 40)]
    alone = list(choices(rows, "demos", partial(judge, 20), workers=1))
    assert list(choices(rows, "demos", partial(judge, 20), workers=2)) == alone
    assert alone[:20] == [row["demos"][0] for row in rows[:20]]
    assert alone[20:] == [Refusal("overlong")] * 19


def write_tokenizer(folder):
    # This import is not at module level: the processes of the test above import this file and must not load torch.
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
    import tiny_model

    tiny_model.make_tokenizer("0123456789").save_pretrained(folder)


REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert extra_info["split"] == "train"
    return {"score": -1.0, "acc": solution_str == ground_truth}
"""


def test_luffys_file_is_converted_for_verl_with_a_report_of_left_out_rows(tmp_path, capsys):
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

    others = [{name: value for name, value in row.items() if name != "target"} for row in rows]
    assert list(read_parquet(output)) == [
        row | {"demonstration": demonstration} for row, demonstration in zip(others, ["12", None, None], strict=True)
    ]
    report = output.with_suffix(".rejected.jsonl")
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        {"row": 1, "index": 1, "data_source": "openr1", "reason": "rejected"},
        {"row": 2, "index": 2, "data_source": "openr1", "reason": "overlong"},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "demonstrations are read from the column target",
        "without one        1  rejected",
        "without one        1  overlong",
        f"report       {report}",
        "verified           1  of 3",
        f"kept               3  of 3, written to {output}",
    ]

    assert main([str(part) for part in [*command, "--only-verified"]]) == 0
    assert list(read_parquet(output)) == [others[0] | {"demonstration": "12"}]
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "left out           1  overlong",
        f"report       {report}",
        "verified           1  of 3",
        f"kept               1  of 3, written to {output}",
    ]

    output.unlink()
    assert main([str(part) for part in [*command, "--success-threshold", 2]]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"hapo_verl.data: {output}: no row has a demonstration that a run would inject. See the reasons above."
    )
    assert not output.exists()


TOOLS = """
from verl.tools.function_tool import function_tool

@function_tool
def double(digits: str) -> str:
    '''Double.

    Args:
        digits: what to double
    '''
    return str(2 * int(digits))
"""


def test_demonstrations_with_calls_are_judged_as_the_run_with_these_tools_would(tmp_path, capsys):
    from tests.rollout.tool_chat import QWEN, make_tokenizer

    function = {"name": "double", "arguments": '{"digits": "6"}'}
    called = [
        message("", "assistant") | {"tool_calls": [{"type": "function", "function": function}]},
        message("12", "tool") | {"tool_calls": None},
        message("12") | {"tool_calls": None},
    ]
    plain = [message("12") | {"tool_calls": None}]
    shared = {"data_source": "x", "reward_model": {"ground_truth": "12"}, "extra_info": {"index": 0}}
    write_parquet([{**shared, "target": target} for target in (called, plain, called[1:])], tmp_path / "in.parquet")
    make_tokenizer(QWEN).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tools.py").write_text(TOOLS)
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    rounds = solution_str.count('<tool_response>')\n"
        "    return float(solution_str.endswith(ground_truth) and extra_info['num_turns'] == 2 + 2 * rounds)\n"
    )
    command = ["demonstrations", "--input", tmp_path / "in.parquet", "--tokenizer", tmp_path / "model"]
    command += ["--max-response-length", 300, "--reward", tmp_path / "reward.py", "--workers", 1]

    def kept(name, *arguments):
        output = tmp_path / f"{name}.parquet"
        assert main([str(part) for part in [*command, "--output", output, *arguments]]) == 0
        return [row["demonstration"] for row in read_parquet(output)]

    tools = f"function_tool_path={tmp_path}/tools.py"
    assert kept("all", "--multi-turn", tools) == [called, [message("12") | {"tool_calls": None}], None]
    assert "without one        1  malformed" in capsys.readouterr().out
    assert kept("limited", "--multi-turn", tools, "max_assistant_turns=1") == [None, "12", None]
    assert "without one        1  overlong" in capsys.readouterr().out
    output = tmp_path / "no.parquet"
    assert main([str(part) for part in [*command, "--output", output, "--multi-turn", "function_tool=x"]]) == 1
    assert (
        "actor_rollout_ref.rollout.multi_turn.function_tool: no such key. Use one of enable, "
        in capsys.readouterr().err
    )
    # The single-turn loop calls no tools.
    assert kept("single") == [None, "12", None]


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
