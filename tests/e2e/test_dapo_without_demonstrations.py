"""DAPO's preset as in its paper, in the synchronous trainer."""

import pytest

from tests.e2e.conftest import PROMPTS, ROLLOUTS
from tests.e2e.test_limits import HAPO, SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_every_trained_group_has_a_signal_and_other_groups_were_resampled(trainer):
    run = trainer("dapo", "+hapo=dapo", *SCRIPTED, "trainer.save_freq=-1", *HAPO, steps=2, whole=False)
    assert len(run.groups) == 2 * PROMPTS
    for group in run.groups:
        assert group["outcome"] == "not_fired"
        assert 0 < sum(group["successes"]) < ROLLOUTS
    assert sum(logged.get("training/filter_groups/evicted_samples", 0) for logged in run.steps) > 0
    assert not any(row["hapo_demonstration"] for row in run.loss_rows)
