"""LUFFY in verl's own trainer: what defines it, on the rows that reached the loss."""

import pytest

from tests.e2e.conftest import ROLLOUTS
from tests.e2e.test_limits import HAPO, SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.long]
TRACED = [*SCRIPTED, "trainer.save_freq=-1", *HAPO]


def test_luffys_preset_compares_all_rows_and_clips_nothing(trainer):
    run = trainer("luffy", "+hapo=luffy", *TRACED, steps=2)
    for group in run.groups:
        assert group["outcome"] == "injected"
        rows = [row for row in run.loss_rows if row["uid"] == group["uid"]]
        (demonstration,) = [row for row in rows if row["hapo_demonstration"]]
        kept = [score for i, score in enumerate(group["scores"]) if i != group["replaced"]]
        mean = (sum(kept) + 1) / ROLLOUTS
        assert demonstration["advantages"][0] == pytest.approx(1 - mean, abs=1e-6)
        expected = sorted([score - mean for score in kept] + [1 - mean])
        assert sorted(row["advantages"][0] for row in rows) == pytest.approx(expected, abs=1e-6)
    assert all(logged["actor/pg_clipfrac"] == 0 for logged in run.steps)
