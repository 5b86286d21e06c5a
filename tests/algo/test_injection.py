"""Which rollout the demonstration replaces."""

import random

from hypothesis import given
from hypothesis import strategies as st

from hapo_verl.algo.injection import Rollout, is_success, worst_rollout

rollouts = st.builds(
    Rollout,
    score=st.sampled_from([-1.0, 0.0, 0.1, 1.0]),
    success=st.booleans(),
    truncated=st.booleans(),
    length=st.integers(0, 5),
)


def a_rollout(score=0.0, truncated=False, length=3):
    return Rollout(score=score, success=False, truncated=truncated, length=length)


def test_the_rollout_with_the_lowest_score_is_replaced():
    group = [a_rollout(0.5, truncated=True), a_rollout(0.1), a_rollout(0.5, length=9)]
    assert worst_rollout(group, random.Random(0)) == 1


def test_among_equal_scores_a_truncated_rollout_is_replaced_before_a_longer_one():
    group = [a_rollout(length=9), a_rollout(truncated=True, length=2), a_rollout()]
    assert worst_rollout(group, random.Random(0)) == 1


def test_among_equal_rollouts_the_longest_is_replaced():
    assert worst_rollout([a_rollout(length=2), a_rollout(length=4), a_rollout()], random.Random(0)) == 1


def test_the_random_generator_chooses_among_equal_rollouts_and_can_choose_each():
    group = [a_rollout(), a_rollout(), a_rollout(1.0)]
    chosen = {worst_rollout(group, random.Random(seed)) for seed in range(20)}
    assert chosen == {0, 1}
    assert worst_rollout(group, random.Random(3)) == worst_rollout(group, random.Random(3))


@given(st.lists(rollouts, min_size=1, max_size=8), st.integers(0, 5))
def test_no_rollout_scores_lower_than_the_replaced_one(group, seed):
    chosen = group[worst_rollout(group, random.Random(seed))]
    assert chosen.score == min(rollout.score for rollout in group)
    equals = [rollout for rollout in group if rollout.score == chosen.score]
    assert chosen.truncated == any(rollout.truncated for rollout in equals)


def test_success_is_the_accuracy_if_there_is_one_and_else_the_score():
    assert is_success(0.1, True, 1.0)
    assert not is_success(1.0, 0.0, 1.0)
    assert is_success(1.0, None, 1.0)
    assert not is_success(0.9, None, 1.0)
