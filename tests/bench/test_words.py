"""The table of the quickstart's runs agrees with their results, and the committed table with the committed results."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import words

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
