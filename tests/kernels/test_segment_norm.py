"""Group normalisation: the same bits as verl, and exactly 0 for groups with equal scores."""

import math
import re

import pytest
import torch

from hapo_kernels.segment_norm import segment_ids, segment_norm, segment_norm_tokens, segment_stats


def shuffled_groups(groups, size, generator):
    return torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size, generator=generator)]


def test_two_groups_by_hand():
    score_B = torch.tensor([1.0, 5.0, 0.0, 7.0, 0.0])
    segment_B = torch.tensor([4, -9, 4, -9, 4])
    # Group 4: mean 1/3, unbiased std sqrt((4/9 + 1/9 + 1/9) / 2) = sqrt(1/3). Group -9: mean 6, std sqrt(2).
    third, root = 1 / 3, math.sqrt(1 / 3)
    expected = [(1 - third) / root, -1 / math.sqrt(2), -third / root, 1 / math.sqrt(2), -third / root]
    torch.testing.assert_close(segment_norm(score_B, segment_B, scale_by_std=True, eps=0.0), torch.tensor(expected))
    centred_B = segment_norm(score_B, segment_B, scale_by_std=False)
    torch.testing.assert_close(centred_B, torch.tensor([1 - third, -1, -third, 1, -third]))


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_the_bits_equal_verls_grpo_for_sizes_2_to_64(scale_by_std):
    grpo = pytest.importorskip("verl.trainer.ppo.core_algos").compute_grpo_outcome_advantage
    generator = torch.Generator().manual_seed(0)
    for size in range(2, 65):
        segment_B = shuffled_groups(3, size, generator)
        for score_B in (
            3 * torch.randn(3 * size, generator=generator),
            (torch.rand(3 * size, generator=generator) < 0.5).float(),
            1e6 + 1e-3 * torch.randn(3 * size, generator=generator),
        ):
            verl_B = grpo(
                score_B[:, None].clone(),
                torch.ones(3 * size, 1),
                segment_B.numpy(),
                norm_adv_by_std_in_grpo=scale_by_std,
            )[0][:, 0]
            stats = segment_stats(score_B, segment_B)
            # verl leaves rounding noise in constant groups; ours are exactly 0.
            ours_B = segment_norm(score_B, segment_B, scale_by_std=scale_by_std)
            assert torch.equal(ours_B[~stats.is_constant_B], verl_B[~stats.is_constant_B]), f"size={size}"
            assert (ours_B[stats.is_constant_B] == 0).all()


def test_the_bits_equal_verls_grpo_for_mixed_group_sizes():
    grpo = pytest.importorskip("verl.trainer.ppo.core_algos").compute_grpo_outcome_advantage
    generator = torch.Generator().manual_seed(1)
    segment_B = torch.cat([torch.full((size,), 1000 - 7 * size) for size in (2, 3, 5, 8, 8, 9, 17, 64, 200)])
    segment_B = segment_B[torch.randperm(len(segment_B), generator=generator)]
    score_B = torch.randn(len(segment_B), generator=generator)
    verl_B = grpo(score_B[:, None].clone(), torch.ones(len(score_B), 1), segment_B.numpy())[0][:, 0]
    assert torch.equal(segment_norm(score_B, segment_B, scale_by_std=True), verl_B)


@pytest.mark.parametrize("score", [0.1, 0.3, 0.7, 1.1, 2.3, -1e6])
def test_equal_scores_give_exactly_zero(score):
    for size in range(1, 65):
        for dtype in (torch.float32, torch.float64):
            advantage_B = segment_norm(
                torch.full((size,), score, dtype=dtype), torch.full((size,), 3), scale_by_std=True
            )
            assert (advantage_B == 0).all(), f"size={size}"
        assert (segment_stats(torch.full((size,), score), torch.full((size,), 3)).std_B == 0).all()


def test_a_group_of_one_row_gets_zero_where_verl_gives_its_score():
    stats = segment_stats(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([7, 8, 8]))
    assert stats.mean_B.tolist() == [5.0, 0.5, 0.5]
    assert stats.std_B[0] == 0
    assert stats.is_constant_B.tolist() == [True, False, False]
    assert segment_norm(torch.tensor([5.0]), torch.tensor([7]), scale_by_std=True).item() == 0


def test_a_nan_or_infinite_score_stays_in_its_group():
    for bad in (math.nan, math.inf):
        score_B, segment_B = torch.tensor([1.0, bad, 0.0, 2.0]), torch.tensor([0, 1, 0, 1])
        advantage_B = segment_norm(score_B, segment_B, scale_by_std=True)
        assert torch.equal(advantage_B[[0, 2]], segment_norm(score_B[[0, 2]], segment_B[[0, 2]], scale_by_std=True))
        assert advantage_B[[1, 3]].isnan().any()


def test_one_group_does_not_see_another():
    generator = torch.Generator().manual_seed(2)
    score_B, segment_B = torch.randn(40, generator=generator), shuffled_groups(5, 8, generator)
    advantage_B = segment_norm(score_B, segment_B, scale_by_std=True)
    for group in range(5):
        row = segment_B == group
        assert torch.equal(segment_norm(score_B[row], segment_B[row], scale_by_std=True), advantage_B[row])


def test_names_of_groups_do_not_matter():
    generator = torch.Generator().manual_seed(3)
    score_B, segment_B = torch.randn(24, generator=generator), shuffled_groups(6, 4, generator)
    names_G = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 5, 2**40])
    expected_B = segment_norm(score_B, segment_B, scale_by_std=True)
    assert torch.equal(segment_norm(score_B, names_G[segment_B], scale_by_std=True), expected_B)
    labels_B = [f"uid-{number}" for number in segment_B.tolist()]
    assert torch.equal(segment_norm(score_B, segment_ids(labels_B), scale_by_std=True), expected_B)
    assert segment_ids(["b", "a", "b"]).tolist() == [0, 1, 0]


def test_rows_outside_keep_receive_the_statistics_and_do_not_change_them():
    score_B, segment_B = torch.tensor([0.0, 1.0, 9.0, 4.0]), torch.tensor([0, 0, 0, 1])
    keep_B = torch.tensor([True, True, False, False])
    stats = segment_stats(score_B, segment_B, keep_B=keep_B)
    assert stats.mean_B.tolist() == [0.5, 0.5, 0.5, 0.0]
    assert stats.count_B.tolist() == [2, 2, 2, 0]
    torch.testing.assert_close(stats.std_B, torch.tensor([0.5, 0.5, 0.5, 0.0]).sqrt())
    assert stats.is_constant_B.tolist() == [False, False, False, True]


def test_append_gives_the_teacher_of_8_failures_an_advantage_of_3():
    teacher_B = torch.tensor([False] * 8 + [True])
    score_B, segment_B = teacher_B.float(), torch.zeros(9, dtype=torch.int64)
    on, everyone = segment_stats(score_B, segment_B, keep_B=~teacher_B), segment_stats(score_B, segment_B)
    advantage_B = (score_B - on.mean_B) / (torch.where(teacher_B, everyone.std_B, on.std_B) + 1e-6)
    assert (advantage_B[:8] == 0).all()
    torch.testing.assert_close(advantage_B[8].item(), 3.0, atol=1e-5, rtol=0)


def test_half_precision_is_computed_in_fp32_and_fp64_stays():
    score_B, segment_B = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.zeros(4, dtype=torch.int64)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(
            segment_norm(score_B.to(dtype), segment_B, scale_by_std=True),
            segment_norm(score_B, segment_B, scale_by_std=True),
        )
    assert segment_norm(score_B.double(), segment_B, scale_by_std=True).dtype == torch.float64


def test_no_rows_give_no_rows():
    empty = torch.zeros(0, dtype=torch.int64)
    assert segment_norm(torch.zeros(0), empty, scale_by_std=True).tolist() == []


def test_a_million_rows_of_one_group_match_fp64():
    score_B = 1e3 + torch.randn(1_000_000, generator=torch.Generator().manual_seed(4))
    segment_B = torch.zeros(1_000_000, dtype=torch.int64)
    exact_B = segment_norm(score_B.double(), segment_B, scale_by_std=True)
    plain_B = (score_B - score_B.mean()) / (score_B.std() + 1e-6)
    ours_B = segment_norm(score_B, segment_B, scale_by_std=True)
    assert (ours_B - exact_B).abs().max() <= 2 * (plain_B - exact_B).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("score", "segment", "keep", "message"),
    [
        (
            torch.zeros(2, 2),
            torch.zeros(2).long(),
            None,
            r"score_B: torch.float32 of shape \(2, 2\): one floating-point score a row",
        ),
        (torch.zeros(2).long(), torch.zeros(2).long(), None, r"score_B: torch.int64 .* Use reward_BT.sum"),
        (torch.zeros(2), torch.zeros(2), None, r"segment_B: torch.float32 .* Use segment_ids"),
        (torch.zeros(2), torch.zeros(3).long(), None, r"segment_B: .* each of the 2 rows"),
        (torch.zeros(2), torch.zeros(2).long(), torch.ones(2), r"keep_B: torch.float32 .* Use mask.bool"),
    ],
)
def test_a_wrong_input_is_refused_in_one_line(score, segment, keep, message):
    with pytest.raises(ValueError, match=message):
        segment_stats(score, segment, keep_B=keep)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl='cuda': no such implementation"):
        segment_norm(torch.zeros(1), torch.zeros(1).long(), scale_by_std=True, impl="cuda")


def test_tokens_get_the_advantage_of_their_row_and_masked_tokens_exactly_0():
    mask_T = torch.tensor([1, 0, 1, 1, 1, 0])
    advantage_T = segment_norm_tokens(
        torch.tensor([1.0, 5.0, 3.0, 7.0]),
        torch.tensor([0, 1, 0, 1]),
        mask_T=mask_T,
        token_offset_B1=torch.tensor([0, 3, 3, 4, 6]),
        scale_by_std=False,
    )
    # Rows of 3, 0, 1 and 2 tokens; group means 2 and 6.
    assert advantage_T.tolist() == [-1.0, 0.0, -1.0, 1.0, 1.0, 0.0]


def test_a_nan_reward_reaches_no_masked_token():
    advantage_T = segment_norm_tokens(
        torch.tensor([math.nan, 1.0]),
        torch.tensor([0, 0]),
        mask_T=torch.tensor([0.0, 1.0, 0.0]),
        token_offset_B1=torch.tensor([0, 2, 3]),
        scale_by_std=True,
    )
    assert advantage_T.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"mask_T": torch.ones(2, 2)},
            "mask_T of shape (2, 2): the tokens of all rows, one after the other. Use mask.values() of a jagged mask.",
        ),
        (
            {"token_offset_B1": torch.tensor([0, 4])},
            "token_offset_B1: torch.int64 of shape (2,): integer bounds of 2 rows. Use mask.offsets() of a jagged mask.",
        ),
        (
            {"token_offset_B1": torch.tensor([0, 3, 3])},
            "token_offset_B1=[0, 3, 3]: bounds rise from 0 to the number of tokens, 4. Use cumsum of the rows' lengths.",
        ),
    ],
)
def test_tokens_that_do_not_belong_to_the_rows_are_refused(monkeypatch, wrong, message):
    monkeypatch.setenv("HAPO_KERNELS_DEBUG", "1")
    given = {"mask_T": torch.ones(4), "token_offset_B1": torch.tensor([0, 1, 4])} | wrong
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        segment_norm_tokens(torch.ones(2), torch.zeros(2).long(), scale_by_std=True, **given)
