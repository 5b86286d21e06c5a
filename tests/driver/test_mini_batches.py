"""The division of a step's rows into mini-batches: with whole groups, and without left-out rows."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_verl.driver.mini_batches import grown_mini_batch, mini_batch_of, order_of_whole_groups, pack, reduced


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=24),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.randoms(use_true_random=False),
)
def test_no_group_is_cut_and_no_row_lost_on_any_number_of_ranks(sizes, updates, dp_size, rng):
    block = SimpleNamespace(
        actor=SimpleNamespace(ppo_mini_batch_size=-(-len(sizes) // updates), use_dynamic_bsz=True),
        rollout=SimpleNamespace(n=8, log_prob_use_dynamic_bsz=True),
        ref=SimpleNamespace(log_prob_use_dynamic_bsz=True),
    )
    appended = sizes.count(9)
    mini_batches, prompts = grown_mini_batch(block, sum(sizes), appended, dp_size, sizes)
    rows = mini_batches * prompts * 8
    group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
    group_of += range(100, 100 + rows - len(group_of))  # Each padding row is a group of its own.
    loads = [rng.randint(1, 50) for _ in group_of]
    order = order_of_whole_groups(group_of, loads, mini_batches, dp_size)
    assert sorted(order) == list(range(rows))
    # verl gives each rank a slice, and divides the slice into mini-batches.
    of_rank, of_step = rows // dp_size, rows // dp_size // mini_batches
    step_of_group = {}
    for position, row in enumerate(order):
        step = position % of_rank // of_step
        assert step_of_group.setdefault(group_of[row], step) == step


def test_groups_of_equal_size_are_balanced_by_load():
    bin_of = pack([8] * 6, [60, 10, 10, 10, 20, 10], bins=2, capacity=24)
    assert bin_of is not None
    assert sorted(
        sum(load for load, b in zip([60, 10, 10, 10, 20, 10], bin_of, strict=True) if b == k) for k in (0, 1)
    ) == [40, 80]


@pytest.mark.parametrize(("sizes", "capacity"), [([9], 8), ([5, 5, 5], 9)])
def test_groups_that_do_not_fit_are_reported(sizes, capacity):
    assert pack(sizes, sizes, bins=2, capacity=capacity) is None


@settings(max_examples=200)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 6),
    st.floats(0, 1),
    st.one_of(st.none(), st.integers(1, 6)),
    st.randoms(use_true_random=False),
)
def test_kept_rows_stay_in_their_mini_batch_and_slices_are_equal(mini_batches, dp_size, of_slice, share, micro, rng):
    rows = mini_batches * dp_size * of_slice
    keep, lengths = [rng.random() < share for _ in range(rows)], [rng.randint(1, 50) for _ in range(rows)]
    order, of_update, of_micro = reduced(keep, lengths, mini_batches, dp_size, micro)
    assert len(set(order)) == len(order) == of_update * mini_batches
    assert {row for row in range(rows) if keep[row]} <= set(order)
    before = mini_batch_of(rows, mini_batches, dp_size)
    after = mini_batch_of(len(order), mini_batches, dp_size)
    assert [before[row] for row in order] == after
    # A rank's part of an update consists of whole micro-batches, or is unchanged.
    if of_micro is not None:
        assert of_micro <= micro
        assert of_update // dp_size % of_micro == 0
    else:
        assert micro is None or len(order) == rows
    # There are as many rows as the fullest mini-batch needs, up to one more per rank or per micro-batch.
    needed = max(1, *(-(-sum(keep[row] for row in range(rows) if before[row] == m) // dp_size) for m in before))
    micro_batches = of_update // dp_size // of_micro if of_micro else 1
    assert len(order) == rows or of_update // dp_size < needed + micro_batches
    # The rows that fill up are not longer than those that are left out.
    for m in set(before):
        filled = [lengths[row] for row in order if before[row] == m and not keep[row]]
        left_out = [lengths[row] for row in range(rows) if before[row] == m and row not in order]
        assert not filled or not left_out or max(filled) <= min(left_out)


def test_ranks_get_about_equal_loads_of_kept_rows():
    keep = [True, True, True, True, False, False, False, False]
    order, of_update, _ = reduced(keep, [100, 90, 20, 10, 5, 5, 5, 5], 1, 2)
    assert of_update == 4
    assert sorted([sorted(order[:2]), sorted(order[2:])]) == [[0, 3], [1, 2]]


def test_if_every_row_is_kept_the_batch_is_unchanged():
    assert reduced([True] * 12, list(range(12)), 2, 3) == (list(range(12)), 6, None)
    assert reduced([True] * 12, list(range(12)), 2, 3, micro_batch=2) == (list(range(12)), 6, None)


def test_fixed_micro_batches_are_made_smaller_instead_of_filled_up():
    # 17 rows in micro-batches of at most 16 rows become two micro-batches of 9.
    order, of_update, micro = reduced([row < 17 for row in range(64)], [1] * 64, 1, 1, micro_batch=16)
    assert (len(order), of_update, micro) == (18, 18, 9)
