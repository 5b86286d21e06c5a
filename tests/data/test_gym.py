"""Tasks of reasoning-gym as rows for verl: verified by the task's own score, with demonstrations from its solutions."""

import json

import pytest
import reasoning_gym

from hapo_verl.data import gym
from hapo_verl.data.__main__ import main
from hapo_verl.data.parquet import DataError, read_parquet


def test_worked_solutions_become_demonstrations_that_the_reward_accepts(tmp_path, capsys):
    path = tmp_path / "train.parquet"
    assert main(["reasoning-gym", "--task", "gsm_symbolic", "--size", "20", "--output", str(path), "--seed", "3"]) == 0
    rows = list(read_parquet(path))
    entries = list(reasoning_gym.create_dataset("gsm_symbolic", size=20, seed=3))
    assert [row["prompt"][0]["content"] for row in rows] == [entry["question"] for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        assert row["data_source"] == "reasoning_gym/gsm_symbolic"
        assert row["demonstration"] == entry["metadata"]["answer_cot"].strip()
        score = gym.compute_score(row["data_source"], row["demonstration"], "", row["extra_info"])
        assert score == {"score": 1.0, "acc": 1.0}
        wrong = row["demonstration"] + "\n#### 123456789"
        assert gym.compute_score(row["data_source"], wrong, "", row["extra_info"])["acc"] == 0.0
    assert "kept              20  of 20" in capsys.readouterr().out


def test_a_task_without_worked_solutions_is_reported_and_gets_no_column(tmp_path, capsys):
    path = tmp_path / "train.parquet"
    assert main(["reasoning-gym", "--task", "basic_arithmetic", "--size", "5", "--output", str(path)]) == 0
    rows = list(read_parquet(path))
    assert len(rows) == 5
    assert "demonstration" not in rows[0]
    assert json.loads(rows[0]["extra_info"]["entry"])["answer"] == rows[0]["reward_model"]["ground_truth"]
    printed = capsys.readouterr().out
    assert "without one        5  no worked solution" in printed
    assert "basic_arithmetic has no worked solutions: the file gets no demonstration column" in printed


def test_a_solution_that_its_own_task_scores_wrong_is_no_demonstration(monkeypatch):
    real = reasoning_gym.create_dataset

    def create(task, **settings):
        made = real(task, **settings)
        entries = [entry | {"metadata": entry["metadata"] | {"answer_cot": "#### 1e9"}} for entry in made]
        return type("Made", (), {"__iter__": lambda self: iter(entries), "score_answer": made.score_answer})()

    monkeypatch.setattr(reasoning_gym, "create_dataset", create)
    monkeypatch.setattr(gym, "_DATASETS", {})
    rows, without = gym.rows("gsm_symbolic", size=4, seed=0, split="train")
    assert without == {"worked solution is no success": 4}
    assert [row["demonstration"] for row in rows] == [None] * 4


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 + 7 = 12\n#### 12", "12"),
        ("#### 1\nno, #### 12 ", "12"),
        ("I think <answer> 12 </answer>", "12"),
        ("<answer>1</answer> or <answer>12</answer>", "12"),
        (" 12\n", "12"),
    ],
)
def test_the_final_answer_is_the_last_one_that_the_response_marks(text, answer):
    assert gym.final_answer(text) == answer


def test_an_unknown_task_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(
        DataError, match=r"^--task gsm_symbolik: reasoning-gym has no such task. Did you mean gsm_symbolic"
    ):
        gym.dataset("gsm_symbolik")
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"reasoning-gym is not installed. pip install reasoning-gym==0.1.25"):
        gym.dataset("gsm_symbolic")
