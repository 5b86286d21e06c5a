"""The table of the quickstart's runs agrees with their results, and the committed table with the committed results."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import words
import words_before

RESULTS = Path(words.__file__).parent / "results" / "quickstart_words"


def result(preset, seed, last, **more):
    curves = {words.HELD_OUT: [[0, 0.0], [6, last]], words.NEW: [[0, 0.0], [6, last / 2]]}
    known = {"steps": 6, "seconds": 600, "peak_memory_gib": 9.96, "commit": "abc", "machine": "m"}
    return {"preset": preset, "seed": seed, "curves": curves} | known | more


@pytest.fixture
def folder(tmp_path):
    for preset, seed, last in (("grpo", 1, 0.0), ("plus", 2, 0.5), ("plus", 1, 0.75)):
        (tmp_path / f"{preset}-seed{seed}.json").write_text(json.dumps(result(preset, seed, last)))
    return tmp_path


def test_each_preset_has_a_row_with_one_value_per_seed(folder):
    header, _, *rows = words.table(words.runs(folder)).splitlines()
    assert header.startswith("| preset | seeds |")
    assert rows == [
        "| `plus` | 1, 2 | 6 | 0.00, 0.00 | **0.75, 0.50** | 0.38, 0.25 | 10, 10 | 10.0, 10.0 | abc |",
        "| `grpo`, verl's own | 1 | 6 | 0.00 | **0.00** | 0.00 | 10 | 10.0 | abc |",
    ]


def test_runs_of_different_lengths_have_separate_rows(folder):
    (folder / "plus-9steps-seed1.json").write_text(json.dumps(result("plus", 1, 0.9, steps=9)))
    _, _, *rows = words.table(words.runs(folder)).splitlines()
    assert [row.split("|")[1:6:2] for row in rows] == [
        [" `plus` ", " 6 ", " **0.75, 0.50** "],
        [" `plus` ", " 9 ", " **0.90** "],
        [" `grpo`, verl's own ", " 6 ", " **0.00** "],
    ]


def test_a_run_without_a_measured_memory_has_a_dash_and_its_note_a_line(folder):
    more = {"peak_memory_gib": None, "note": "It was ended early."}
    (folder / "grpo-seed2.json").write_text(json.dumps(result("grpo", 2, 0.0, **more)))
    found = words.runs(folder)
    assert words.table(found).splitlines()[-1].endswith("| 10, 10 | 10.0, – | abc |")
    assert words.notes(found) == "- `grpo`, seed 2, 6 steps: It was ended early.\n"


def test_a_trial_has_its_setting_and_its_command_and_is_in_no_other_table(folder):
    before, command = words.table(words.runs(folder)), 'make quickstart PRESET=plus OVERRIDES="a.b=10"'
    (folder / "trials").mkdir()
    (folder / "trials" / "plus-seed1-gradient-clip-1.json").write_text(
        json.dumps(result("plus", 1, 0.9, command=command))
    )
    _, _, *rows = words.trials(folder / "trials").splitlines()
    assert rows == [f"| gradient clip 1 | `{command}` | 0.90 | 0.45 | 10 | abc |"]
    assert words.table(words.runs(folder)) == before


def test_a_transcript_has_every_problem_before_and_after():
    text = words.transcript({"answers": [["Q?", "4", "2 + 2 = 5", "2 + 2 = 4\n#### 4"]]})
    assert text == "Q?  [4]\n--- before\n2 + 2 = 5\n--- after\n2 + 2 = 4\n#### 4\n"


def test_the_committed_table_agrees_with_the_committed_results():
    text = (RESULTS / "README.md").read_text()
    assert words.table(words.runs(RESULTS)) in text
    assert words.trials(RESULTS / "trials") in text
    assert words.notes(words.runs(RESULTS)) in text
    assert (RESULTS / "curves.png").exists()


def test_what_the_model_can_do_before_training_is_said_in_words(tmp_path):
    success = {"heldout_success": {"strict": 0.0, "lenient": 0.25, "sums": 0.5, "problems": 4}}
    success["new_templates_success"] = {"strict": 0.125, "lenient": 0.75, "sums": 1.0, "problems": 4}
    result = {"tokens": 128, "success": success, "machine": {"commit": "abc"}}
    (tmp_path / "before.json").write_text(json.dumps(result))
    text = words.before(tmp_path / "before.json")
    assert "commit abc" in text
    assert "0.00 and 0.12 are right" in text
    assert "0.25 and 0.75 if the last number" in text
    assert "0.50 and 1.00 of the results" in text
    assert words.before(tmp_path / "absent.json") == ""


def test_the_readers_of_answers_before_training():
    assert words_before.last_number_is("She has 1,200 - 3 = 1,197 eggs.", "1197")
    assert words_before.last_number_is("#### 007", "7")
    assert not words_before.last_number_is("12 eggs, 13 pens", "12")
    assert not words_before.last_number_is("none", "0")


@pytest.mark.parametrize(("known", "share"), [("12", 1.0), ("1", 0.5), ("", 0.0)])
def test_a_sum_is_right_if_every_digit_of_its_result_is_the_models_own(known, share):
    """Here the model's own tokens are a fixed text; the results are 12 and 1, and the last line is no sum."""
    text = "5 + 7 = 12\n9 - 8 = 1\n#### 1"
    own = "".join(c if c in known else "x" for c in text)

    class Policy:
        tokenizer = SimpleNamespace(decode=lambda ids: chr(ids[0]))

        def demonstration_rows(self, problems):
            return SimpleNamespace(response_BT=torch.tensor([[ord(c) for c in text]]))

        def log_probabilities(self, rows):
            return torch.nn.functional.one_hot(torch.tensor([[ord(c) for c in own]]), 128).float()

    assert words_before.sums(Policy(), ["a problem"]) == share
