"""TRL's own tests with our trainer: how a test is counted, and that the stand-ins provide what the tests need."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import trl_own_tests
import trl_stand_ins

PASSED, FAILED = {"outcome": "passed", "error": None}, {"outcome": "failed", "error": "ValueError: no"}
REFUSED = {"outcome": "failed", "error": "ConfigError: loss_type=bnpo: no. Use grpo."}
SKIPPED = {"outcome": "skipped", "error": "Skipped: test requires vllm"}


@pytest.mark.parametrize(
    ("theirs", "ours", "kind"),
    [
        (PASSED, PASSED, "passed"),
        (PASSED, FAILED, "failed by ours"),
        (FAILED, FAILED, "failed by both"),
        (FAILED, PASSED, "passed by ours"),
        (PASSED, REFUSED, "refused"),
        (FAILED, REFUSED, "refused"),
        (SKIPPED, SKIPPED, "skipped"),
    ],
)
def test_only_a_refusal_in_one_line_is_not_a_failure(theirs, ours, kind):
    assert trl_own_tests.kind(theirs, ours) == kind


def test_a_table_names_each_failure_that_only_our_trainer_has():
    outcomes = {
        "one": {"trl": PASSED, "hapo": PASSED, "demonstrated": FAILED | {"judged": 4, "injected": 3}},
        "two": {"trl": PASSED, "hapo": REFUSED, "demonstrated": REFUSED},
    }
    about = dict.fromkeys(("torch", "trl", "transformers", "command", "commit", "date", "device"), "")
    text = trl_own_tests.table({"origin": "here", "machine": about, "outcomes": outcomes})
    assert "| `one` | demonstrated | ValueError: no |" in text
    assert "| 1 | loss_type=bnpo: no. Use grpo. |" in text
    assert "| groups with a demonstration | not counted | 3 of 4 |" in text


def test_a_demonstration_ends_within_eight_tokens():
    """A token is a byte here, and most of TRL's tests allow eight tokens."""
    rows = trl_stand_ins.load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train")
    assert len(rows) == 17
    assert all(row["demonstration"] is None or len(row["demonstration"]) < 8 for row in rows)
    assert len({row["prompt"] for row in rows}) == 17
