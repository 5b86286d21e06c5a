"""SRFT in verl's own trainer: what defines it, on the rows that reached the loss."""

import pytest
import torch

from tests.e2e.conftest import PROMPTS
from tests.e2e.test_limits import HAPO, SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.long]
TRACED = [*SCRIPTED, "trainer.save_freq=-1", *HAPO]
STEPS = 2


def test_srfts_preset_weights_every_row_by_one_entropy(trainer):
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
