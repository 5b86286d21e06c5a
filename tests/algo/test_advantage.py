"""Group-relative advantages compared with a worked example and with verl's own estimator."""

import math

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from hapo_verl.algo.advantage import appended_advantage, group_advantage, scored_advantage, session_advantage


def test_one_demonstration_among_seven_failures():
    score_B = torch.tensor([0.0] * 7 + [1.0])
    advantage_B = group_advantage(score_B, torch.zeros(8, dtype=torch.int64), scale_by_std=True)
    # The mean is 1/8, and the deviation with N − 1 is √(1/8).
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


def test_only_the_last_output_of_a_session_counts_and_the_others_get_its_advantage():
    # Session 0 wrote two outputs, the first with a score that must not matter.
    score_B = torch.tensor([9.0, 1.0, 0.0, 0.0])
    session_B, output_B = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 0])
    advantage_B = session_advantage(score_B, torch.zeros(4, dtype=torch.int64), session_B, output_B, scale_by_std=False)
    assert advantage_B.tolist() == pytest.approx([2 / 3, 2 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize(
    ("scores", "teacher", "others"),
    [
        # 1 / (1/3) after eight failures; the failures get no advantage.
        ([0.0] * 8, 1 / (1 / 3), 0.0),
        # The policy's mean is 1/2; the deviation is over nine rows, five of them 1.
        ([1.0] * 4 + [0.0] * 4, 0.5 / (20 / 9 / 8) ** 0.5, None),
        ([1.0] * 8, 0.0, 0.0),
    ],
)
def test_an_appended_demonstration_is_compared_with_the_policys_own_rows(scores, teacher, others):
    score_B = torch.tensor([*scores, 1.0])
    demonstration_B = torch.arange(9) == 8
    group_B = torch.zeros(9, dtype=torch.int64)
    advantage_B = appended_advantage(score_B, group_B, demonstration_B, scale_by_std=True)
    assert advantage_B[8].item() == pytest.approx(teacher, rel=1e-5)
    own = group_advantage(score_B[:8], group_B[:8], scale_by_std=True)
    assert torch.equal(advantage_B[:8], own)
    assert others is None or torch.equal(own, torch.full((8,), others))
    plain = appended_advantage(score_B, group_B, demonstration_B, scale_by_std=False)
    assert plain[8].item() == pytest.approx(1 - sum(scores) / 8)


def test_appended_demonstrations_change_no_row_of_the_policy_whatever_the_order():
    generator = torch.Generator().manual_seed(2)
    group_B = torch.cat([torch.arange(20).repeat_interleave(8), torch.arange(0, 20, 2)])
    score_B = torch.cat([torch.randint(0, 2, (160,), generator=generator).float(), torch.ones(10)])
    order = torch.randperm(170, generator=generator)
    demonstration_B = (torch.arange(170) >= 160)[order]
    score_B, group_B = score_B[order], group_B[order]
    with_rows = appended_advantage(score_B, group_B, demonstration_B, scale_by_std=True)
    verls, _ = compute_grpo_outcome_advantage(
        score_B[~demonstration_B].unsqueeze(-1), torch.ones(160, 1), np.array(group_B[~demonstration_B].tolist())
    )
    assert (with_rows[~demonstration_B] - verls.squeeze(-1)).abs().max() < 1e-6
    assert (with_rows[demonstration_B] > 0).all()


def test_a_demonstration_without_a_group_gets_exactly_zero():
    advantage_B = appended_advantage(
        torch.tensor([1.0, 0.0, 1.0]), torch.tensor([5, 7, 7]), torch.tensor([True, False, False]), scale_by_std=True
    )
    assert advantage_B[0] == 0
    assert advantage_B.isfinite().all()


def test_session_advantages_exclude_appended_rows_from_the_baseline():
    score_B = torch.tensor([0.0, 0.0, 1.0])
    group_B, session_B, output_B = torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    appended_B = torch.tensor([False, False, True])
    advantage_B = session_advantage(score_B, group_B, session_B, output_B, scale_by_std=False, apart_B=appended_B)
    assert advantage_B.tolist() == [0.0, 0.0, 1.0]


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


@pytest.mark.parametrize("apart", [True, False])
def test_a_row_without_a_score_gets_zero_and_changes_no_other_row(apart):
    score, group = torch.tensor([0.0, 1.0, math.nan, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    demonstration, known = torch.tensor([False, False, False, True, False, False]), torch.tensor([0, 1, 3, 4, 5])
    found = scored_advantage(score, group, demonstration, apart=apart, scale_by_std=True)
    alone = scored_advantage(score[known], group[known], demonstration[known], apart=apart, scale_by_std=True)
    assert found[2] == 0
    assert torch.equal(found[known], alone)
    assert found[0] != 0
