"""REAL's preset as in its paper: it trains only on what the policy sampled."""

import pytest

from tests.e2e.conftest import ROLLOUTS
from tests.e2e.test_limits import HAPO, SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_a_group_of_failures_has_weight_zero(trainer):
    run = trainer("real", "+hapo=real", *SCRIPTED, "trainer.save_freq=-1", *HAPO, steps=2)
    assert not any(row["hapo_demonstration"] for row in run.loss_rows)
    scale = ROLLOUTS / 0.5
    failed = 0
    for group in run.groups:
        successes = sum(group["successes"])
        failed += successes == 0
        up, down = (scale / (1 + successes), -scale / (1 + ROLLOUTS - successes)) if successes else (0.0, 0.0)
        weights = sorted(row["hapo_likelihood_weight"] for row in run.loss_rows if row["uid"] == group["uid"])
        assert weights == pytest.approx([down] * (ROLLOUTS - successes) + [up] * successes, rel=1e-4)
    assert failed
