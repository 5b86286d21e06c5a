"""The Triton group normalisation compared with fp64, for any sizes, order and offsets; all launches give equal bits."""

import math

import pytest
import torch

from exactness import DEVICE, STORAGE, assert_no_less_exact
from hapo_kernels.segment_norm import kernel, segment_norm, segment_norm_tokens, segment_stats


def groups(sizes, seed=0, shuffle=True):
    generator = torch.Generator().manual_seed(seed)
    segment = torch.cat([torch.full((size,), 1000 - 37 * i) for i, size in enumerate(sizes)])
    segment = segment[torch.randperm(len(segment), generator=generator)] if shuffle else segment
    return torch.randn(len(segment), generator=generator).to(DEVICE), segment.to(DEVICE)


def check(score_B, segment_B=None, **given):
    exact_score_B = score_B.double()
    for scale_by_std in (True, False):
        settings = {"scale_by_std": scale_by_std, **given}
        assert_no_less_exact(
            segment_norm(score_B, segment_B, impl="triton", **settings),
            segment_norm(score_B, segment_B, impl="reference", **settings),
            segment_norm(exact_score_B, segment_B, impl="reference", **settings),
        )
    ours, same_dtype, exact = (
        segment_stats(score, segment_B, impl=impl, **given)
        for score, impl in ((score_B, "triton"), (score_B, "reference"), (exact_score_B, "reference"))
    )
    assert_no_less_exact(ours.mean_B, same_dtype.mean_B, exact.mean_B, "mean")
    assert_no_less_exact(ours.std_B, same_dtype.std_B, exact.std_B, "std")
    assert torch.equal(ours.count_B, exact.count_B)
    assert torch.equal(ours.is_constant_B, exact.is_constant_B)


@pytest.mark.parametrize("sizes", [[], [1], [2], [1, 2, 3], [8] * 20, [1023, 1024, 1025, 1, 7], [3000]])
def test_every_size_of_group_in_every_storage_dtype(sizes):
    score_B, segment_B = (
        groups(sizes) if sizes else (torch.zeros(0, device=DEVICE), torch.zeros(0, device=DEVICE).long())
    )
    for dtype in STORAGE:
        check(score_B.to(dtype), segment_B)


def test_bounds_are_the_same_groups_as_ids_and_may_be_empty():
    sizes = [0, 3, 0, 0, 1030, 5, 0]
    score_B, segment_B = groups(sizes, shuffle=False)
    offset_S1 = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
    for bounds in (offset_S1, offset_S1.int(), offset_S1.repeat_interleave(2)[::2]):
        check(score_B, offset_S1=bounds)
        by_bounds = segment_norm(score_B, offset_S1=bounds, scale_by_std=True, impl="triton")
        assert torch.equal(by_bounds, segment_norm(score_B, segment_B, scale_by_std=True, impl="triton"))


def test_rows_outside_keep_are_normalised_and_do_not_count():
    score_B, segment_B = groups([1, 2, 9, 9, 1500])
    for share in (0.0, 0.5, 1.0):
        keep_B = torch.rand(len(score_B), generator=torch.Generator().manual_seed(3)).to(DEVICE) < share
        check(torch.where(keep_B, score_B, 7.0), segment_B, keep_B=keep_B)
        poisoned = segment_stats(torch.where(keep_B, score_B, math.nan), segment_B, keep_B=keep_B, impl="triton")
        clean = segment_stats(score_B, segment_B, keep_B=keep_B, impl="triton")
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(poisoned, clean, strict=True))


@pytest.mark.parametrize("score", [0.1, 0.3, 0.7, 1.1, 2.3, -1e6])
def test_equal_scores_give_exactly_zero(score):
    segment_B = torch.repeat_interleave(torch.arange(2, 65)).to(DEVICE)
    score_B = torch.full(segment_B.shape, score, device=DEVICE)
    assert (segment_norm(score_B, segment_B, scale_by_std=True, impl="triton") == 0).all()
    assert segment_stats(score_B, segment_B, impl="triton").is_constant_B.all()


def test_equal_infinities_are_constant_with_a_deviation_of_zero():
    for impl in ("reference", "triton"):
        stats = segment_stats(
            torch.full((3,), math.inf, device=DEVICE), torch.zeros(3, device=DEVICE).long(), impl=impl
        )
        assert (stats.mean_B == math.inf).all()
        assert (stats.std_B == 0).all()
        assert stats.is_constant_B.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_infinite_score_stays_in_its_group(bad):
    score_B, segment_B = groups([4, 5, 2000])
    for position in ((segment_B == 963).nonzero()[0], (segment_B == 963).nonzero()[2]):
        poisoned_B = score_B.clone()
        poisoned_B[position] = bad
        ours = segment_norm(poisoned_B, segment_B, scale_by_std=True, impl="triton")
        clean = segment_norm(score_B, segment_B, scale_by_std=True, impl="triton")
        assert torch.equal(ours[segment_B != 963], clean[segment_B != 963])
        assert ours[segment_B == 963].isnan().any()
        assert not segment_stats(poisoned_B, segment_B, impl="triton").is_constant_B.any()


def test_a_large_offset_loses_no_precision():
    noise_B, segment_B = groups([64, 1500])
    score_B = (1e6 + noise_B.double()).float()
    check(score_B, segment_B)
    exact = segment_norm(score_B.double(), segment_B, scale_by_std=True)
    error = (segment_norm(score_B, segment_B, scale_by_std=True, impl="triton") - exact).abs().max()
    in_torch = (segment_norm(score_B, segment_B, scale_by_std=True, impl="reference") - exact).abs().max()
    assert error < 1e-6 < 1e-4 < in_torch
    check((1e6 + 1e-3 * noise_B.double()).float(), segment_B)


def test_three_launches_give_the_bits_of_one():
    for sizes in ([1, 2, 3], [1023, 1024, 1025, 4096, 5000], [8] * 9):
        score_B, segment_B = groups(sizes)
        keep_B = torch.rand(len(score_B), generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.7
        for keep in (None, keep_B):
            segments = kernel.segments_of(segment_B, keep, None)
            one, three = (
                kernel.run(score_B, segments, scale_by_std=True, eps=1e-6, split=split) for split in (False, True)
            )
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, three, strict=True))


def test_a_long_group_is_split_automatically_and_is_exact():
    score_B = 1e3 + torch.randn(100_000, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    check(score_B, offset_S1=torch.tensor([0, 100_000], device=DEVICE))


def test_names_of_groups_do_not_matter():
    score_B, segment_B = groups([8, 3, 1, 5])
    expected = segment_norm(score_B, segment_B, scale_by_std=True, impl="triton")
    names = {1000: -(2**63), 963: 2**63 - 1, 926: 0, 889: -1}
    renamed_B = torch.tensor([names[number] for number in segment_B.tolist()], device=DEVICE)
    assert torch.equal(segment_norm(score_B, renamed_B, scale_by_std=True, impl="triton"), expected)


def test_two_runs_give_the_same_bits_and_other_groups_do_not_change_a_groups_bits():
    score_B, segment_B = groups([8, 1500, 3, 8])
    first = segment_norm(score_B, segment_B, scale_by_std=True, impl="triton")
    assert torch.equal(first, segment_norm(score_B, segment_B, scale_by_std=True, impl="triton"))
    for group in segment_B.unique():
        row_B = segment_B == group
        alone = segment_norm(score_B[row_B], segment_B[row_B], scale_by_std=True, impl="triton")
        assert torch.equal(alone, first[row_B])


def test_inputs_may_be_strided_and_expanded():
    score_B, segment_B = groups([8, 9])
    strided_B = score_B.repeat_interleave(3)[::3]
    plain = segment_norm(score_B, segment_B, scale_by_std=True, impl="triton")
    assert torch.equal(
        segment_norm(strided_B, segment_B.repeat_interleave(2)[::2], scale_by_std=True, impl="triton"), plain
    )
    assert (segment_norm(score_B[:1].expand(17), segment_B, scale_by_std=True, impl="triton") == 0).all()


def test_the_ops_are_registered_so_that_compile_and_fake_tensors_work():
    score_B, segment_B = groups([3, 4])
    torch.library.opcheck(kernel.segment_norm_op, (score_B, segment_B, None, None, True, 1e-6))
    torch.library.opcheck(kernel.segment_stats_op, (score_B, segment_B, segment_B > 970, None))
    mask_T, token_offset_B1 = torch.ones(14, device=DEVICE), torch.arange(0, 15, 2, device=DEVICE)
    torch.library.opcheck(kernel.spread_op, (score_B, mask_T, token_offset_B1))

    def norm(score_B):
        return segment_norm(score_B, segment_B, scale_by_std=True, impl="triton")

    assert torch.equal(torch.compile(norm, backend="aot_eager", fullgraph=True)(score_B), norm(score_B))


def test_groups_given_twice_or_not_at_all_are_refused():
    score_B, segment_B = groups([3])
    offset_S1 = torch.tensor([0, 3], device=DEVICE)
    for given in ({}, {"segment_B": segment_B, "offset_S1": offset_S1}):
        with pytest.raises(ValueError, match="segment_B and offset_S1: groups are given once"):
            segment_norm(score_B, scale_by_std=True, **given)
    with pytest.raises(ValueError, match="keep_B with offset_S1"):
        segment_norm(score_B, offset_S1=offset_S1, keep_B=segment_B > 0, scale_by_std=True)
    with pytest.raises(ValueError, match=r"offset_S1: torch.float32 of shape \(2,\): S\+1 integer bounds"):
        segment_norm(score_B, offset_S1=offset_S1.float(), scale_by_std=True)


def test_wrong_bounds_are_found_in_debug_mode(monkeypatch):
    monkeypatch.setenv("HAPO_KERNELS_DEBUG", "1")
    for bounds in ([1, 3], [0, 2], [0, 4, 3]):
        with pytest.raises(ValueError, match=r"bounds rise from 0 to the number of rows, 3. Use cumsum"):
            segment_norm(
                torch.zeros(3, device=DEVICE), offset_S1=torch.tensor(bounds, device=DEVICE), scale_by_std=True
            )


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_tokens_get_the_advantage_of_their_row(mask_dtype):
    lengths = [0, 3, 1023, 1, 0, 1024, 1025, 2500, 0]
    score_B, segment_B = groups([4, 5])
    token_offset_B1 = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    mask_T = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.7
    advantage_B = segment_norm(score_B, segment_B, scale_by_std=True, impl="triton")
    expected_T = advantage_B.repeat_interleave(torch.tensor(lengths, device=DEVICE)) * mask_T
    for bounds in (token_offset_B1, token_offset_B1.int()):
        advantage_T = segment_norm_tokens(
            score_B,
            segment_B,
            mask_T=mask_T.to(mask_dtype),
            token_offset_B1=bounds,
            scale_by_std=True,
            impl="triton",
        )
        assert torch.equal(advantage_T, expected_T)


def test_no_rows_and_no_tokens_give_no_advantages():
    none = torch.zeros(0, device=DEVICE)
    advantage_T = segment_norm_tokens(
        none,
        none.long(),
        mask_T=none,
        token_offset_B1=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        scale_by_std=True,
        impl="triton",
    )
    assert advantage_T.shape == (0,)
