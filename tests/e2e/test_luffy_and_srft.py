"""LUFFY and SRFT in verl's own trainer: what defines each, asserted on the rows that reached the loss."""

import pytest
import torch

from tests.e2e.conftest import PROMPTS, ROLLOUTS
from tests.e2e.test_limits import HAPO, SCRIPTED

pytestmark = pytest.mark.e2e
TRACED = [*SCRIPTED, "trainer.save_freq=-1", *HAPO]
STEPS = 2


@pytest.mark.xdist_group("luffy")
def test_luffys_preset_compares_all_rows_and_clips_nothing(trainer):
    run = trainer("luffy", "+hapo=luffy", *TRACED, steps=STEPS)
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


@pytest.mark.xdist_group("srft")
def test_srfts_preset_weighs_every_row_by_one_entropy(trainer):
    run = trainer("srft", "+hapo=srft", *TRACED, steps=STEPS)
    for step in range(1, STEPS + 1):
        uids = {group["uid"] for group in run.groups if group["step"] == step}
        rows = [row for row in run.loss_rows if row["uid"] in uids and any(row["response_mask"])]
        demonstrations = [row for row in rows if row["hapo_demonstration"]]
        assert len(demonstrations) == PROMPTS
        (of_demonstrations,) = {round(row["hapo_likelihood_weight"], 6) for row in demonstrations}
        own = {round(row["hapo_likelihood_weight"], 6) for row in rows if not row["hapo_demonstration"]}
        failure, success = sorted(own)
        assert failure == -1
        entropy = torch.tensor(success / 0.1).log().item()
        assert of_demonstrations == pytest.approx(0.5 * torch.tensor(-entropy).exp().item(), rel=1e-3)
        assert all(row["advantages"][0] == 0 for row in rows if not row["hapo_demonstration"])
        assert all(row["advantages"][0] >= 0 for row in demonstrations)
