"""The gate of `hapo_verl.algo.gate` compared with enumeration, simulation and exact arithmetic."""

import random
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hapo_verl.algo.gate import (
    Situation,
    confidence,
    expected_firing,
    fires,
    firing_probabilities,
    injection_bound,
    thompson_probability,
)
from hapo_verl.config import GATES

UNIFORM = {"prior_success": 1.0, "prior_failure": 1.0}

PAPER = firing_probabilities("paper", 8, Situation())

# The paper's gate at N = 8 and γ = 0.8: (true success rate p, probability of firing).
FIRING = [(0.5, 0.9648), (0.7, 0.7447), (0.8, 0.4967), (0.85, 0.3428), (0.9, 0.1869), (0.95, 0.0572), (0.99, 0.0027)]


def test_eight_rollouts_fire_up_to_six_successes():
    assert injection_bound(8, threshold=0.8, **UNIFORM) == 6


def test_confidence_equal_to_the_threshold_does_not_fire():
    assert confidence(7, 8, **UNIFORM) == 0.8
    assert injection_bound(8, threshold=0.8, **UNIFORM) < 7


@pytest.mark.parametrize(("success_rate", "expected"), FIRING)
def test_firing_probability_equals_the_table_of_the_specification(success_rate, expected):
    assert expected_firing(success_rate, PAPER) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("success_rate", [0.05, 0.3, 0.7, 0.9])
def test_firing_probability_is_the_sum_over_all_outcomes(success_rate):
    situation = Situation(threshold=0.6)
    bound = injection_bound(5, threshold=0.6, **UNIFORM)
    enumerated = sum(
        success_rate ** sum(outcome) * (1 - success_rate) ** (5 - sum(outcome))
        for outcome in product((0, 1), repeat=5)
        if sum(outcome) <= bound
    )
    assert expected_firing(success_rate, firing_probabilities("paper", 5, situation)) == pytest.approx(
        enumerated, abs=1e-12
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("success_rate", [0.5, 0.7, 0.9, 0.99])
def test_a_hundred_thousand_simulated_groups_fire_as_often_as_computed(gate, success_rate):
    draws, groups = np.random.default_rng(0), 100_000
    rng = random.Random(0)
    firing = firing_probabilities(gate, 8, Situation())
    fired = sum(fires(firing, s, rng) for s in draws.binomial(8, success_rate, groups).tolist())
    probability = expected_firing(success_rate, firing)
    sigma = (probability * (1 - probability) / groups) ** 0.5
    assert abs(fired / groups - probability) <= 4 * sigma


def test_a_thompson_draw_of_one_group_is_worse_than_the_mean():
    draws = [thompson_probability(s, 8, threshold=0.8, **UNIFORM) for s in range(9)]
    assert expected_firing(0.9, draws) == pytest.approx(0.370, abs=5e-4)
    # 0.058 of this is for groups in which all succeed; only the gate `always` injects into these.
    assert expected_firing(0.9, firing_probabilities("thompson", 8, Situation())) == pytest.approx(0.312, abs=5e-4)


@pytest.mark.parametrize("successes", [0, 3, 7])
def test_thompson_is_the_comparison_of_a_beta_draw(successes):
    draws, count = np.random.default_rng(1).beta(1 + successes, 9 - successes, 100_000), 100_000
    probability = thompson_probability(successes, 8, threshold=0.8, **UNIFORM)
    sigma = (probability * (1 - probability) / count) ** 0.5
    assert abs((draws < 0.8).mean() - probability) <= 4 * sigma


@given(
    gate=st.sampled_from(list(GATES)),
    rollouts=st.integers(1, 64),
    threshold=st.floats(0, 1),
    prior=st.tuples(st.floats(1e-3, 100), st.floats(1e-3, 100)),
)
def test_no_gate_fires_more_often_after_more_successes(gate, rollouts, threshold, prior):
    firing = firing_probabilities(gate, rollouts, Situation(threshold, *prior))
    assert len(firing) == rollouts + 1
    assert all(0.0 <= after <= before <= 1.0 for before, after in pairwise([1.0, *firing]))
    assert gate == "always" or firing[rollouts] == 0.0


@pytest.mark.parametrize(("gate", "firing"), [("zero", [1, 0, 0]), ("never", [0, 0, 0]), ("always", [1, 1, 1])])
def test_gates_without_a_posterior(gate, firing):
    assert firing_probabilities(gate, 2, Situation(threshold=0.5)) == firing


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("prior", [(1.0, 1.0), (0.5, 0.5), (0.1, 0.9), (3.0, 7.0)])
@pytest.mark.parametrize("rollouts", [2, 3, 8, 16, 64])
def test_the_bound_is_where_the_exact_posterior_mean_reaches_the_threshold(threshold, prior, rollouts):
    bound = injection_bound(rollouts, threshold=threshold, prior_success=prior[0], prior_failure=prior[1])
    gamma, a0, b0 = Fraction(str(threshold)), Fraction(str(prior[0])), Fraction(str(prior[1]))
    for successes in range(rollouts + 1):
        mean = (a0 + successes) / (a0 + b0 + rollouts)
        assert (successes <= bound) == (mean < gamma and successes < rollouts)


def test_a_threshold_of_zero_never_fires():
    assert injection_bound(8, threshold=0.0, **UNIFORM) == -1
    assert expected_firing(0.0, firing_probabilities("paper", 8, Situation(threshold=0.0))) == 0.0


def test_a_group_in_which_all_succeed_is_never_injected():
    assert injection_bound(8, threshold=1.0, prior_success=1.0, prior_failure=100.0) == 7
