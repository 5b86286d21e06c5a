"""A step's rows in optimizer steps of whole groups."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_verl.adapters.mini_batches import grown_mini_batch, order_of_whole_groups, pack


@settings(max_examples=200, deadline=None)
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
    group_of += range(100, 100 + rows - len(group_of))  # padding, each row a group of its own
    loads = [rng.randint(1, 50) for _ in group_of]
    order = order_of_whole_groups(group_of, loads, mini_batches, dp_size)
    assert sorted(order) == list(range(rows))
    # As verl cuts: a slice a rank, then mini-batches within it.
    of_rank, of_step = rows // dp_size, rows // dp_size // mini_batches
    step_of_group = {}
    for position, row in enumerate(order):
        step = position % of_rank // of_step
        assert step_of_group.setdefault(group_of[row], step) == step


def test_groups_of_equal_size_are_spread_by_load():
    bin_of = pack([8] * 6, [60, 10, 10, 10, 20, 10], bins=2, capacity=24)
    assert bin_of is not None
    assert sorted(
        sum(load for load, b in zip([60, 10, 10, 10, 20, 10], bin_of, strict=True) if b == k) for k in (0, 1)
    ) == [40, 80]


@pytest.mark.parametrize(("sizes", "capacity"), [([9], 8), ([5, 5, 5], 9)])
def test_what_does_not_fit_is_said(sizes, capacity):
    assert pack(sizes, sizes, bins=2, capacity=capacity) is None
