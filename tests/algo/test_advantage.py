"""Group-relative advantages against a worked example and against verl's own estimator."""

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from hapo_verl.algo.advantage import group_advantage, session_advantage


def test_one_demonstration_among_seven_failures():
    score_B = torch.tensor([0.0] * 7 + [1.0])
    advantage_B = group_advantage(score_B, torch.zeros(8, dtype=torch.int64), scale_by_std=True)
    # mean 1/8, deviation √(1/8) with N − 1
    assert advantage_B[7].item() == pytest.approx(0.875 / 0.125**0.5, rel=1e-5)
    assert advantage_B[0].item() == pytest.approx(-0.125 / 0.125**0.5, rel=1e-5)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_without_a_demonstration_it_is_verls_grpo_to_the_last_bit(scale_by_std):
    generator = torch.Generator().manual_seed(0)
    group_B = torch.randint(0, 20, (200,), generator=generator)
    group_B = torch.cat([group_B, torch.arange(20)])  # no group of one
    score_B = torch.rand(220, generator=generator)
    mask_BT = torch.ones(220, 1)
    verls, _ = compute_grpo_outcome_advantage(
        score_B.clone().unsqueeze(-1), mask_BT, np.array(group_B.tolist()), norm_adv_by_std_in_grpo=scale_by_std
    )
    assert torch.equal(group_advantage(score_B, group_B, scale_by_std=scale_by_std), verls.squeeze(-1))


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.1, 2.3])
def test_equal_scores_give_exactly_zero(reward):
    advantage_B = group_advantage(torch.full((10,), reward), torch.zeros(10, dtype=torch.int64), scale_by_std=True)
    assert torch.equal(advantage_B, torch.zeros(10))


def test_only_the_last_output_of_a_session_counts_and_the_others_inherit():
    # Session 0 wrote two outputs, the first with a score that must not matter.
    score_B = torch.tensor([9.0, 1.0, 0.0, 0.0])
    session_B, output_B = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 0])
    advantage_B = session_advantage(score_B, torch.zeros(4, dtype=torch.int64), session_B, output_B, scale_by_std=False)
    assert advantage_B.tolist() == pytest.approx([2 / 3, 2 / 3, -1 / 3, -1 / 3])


def test_row_order_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    score_B, order = torch.rand(24, generator=generator), torch.randperm(24, generator=generator)
    group_B, session_B, output_B = torch.arange(24) // 8, torch.arange(24), torch.zeros(24, dtype=torch.int64)
    straight = session_advantage(score_B, group_B, session_B, output_B, scale_by_std=True)
    shuffled = session_advantage(score_B[order], group_B[order], session_B[order], output_B, scale_by_std=True)
    assert torch.allclose(shuffled, straight[order], atol=1e-6)


def test_a_batch_without_rows_has_no_advantages():
    empty = torch.zeros(0, dtype=torch.int64)
    assert session_advantage(torch.zeros(0), empty, empty, empty, scale_by_std=True).shape == (0,)
