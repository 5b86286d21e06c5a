"""The gate of `hapo_verl.algo.gate` against enumeration, simulation and exact arithmetic."""

import random
from fractions import Fraction
from itertools import product

import pytest

from hapo_verl.algo.gate import confidence, firing_probability, injection_bound

UNIFORM = {"prior_success": 1.0, "prior_failure": 1.0}

# hapo at N = 8, γ = 0.8: probability of firing at true success rate p.
FIRING = [(0.5, 0.9648), (0.7, 0.7447), (0.8, 0.4967), (0.85, 0.3428), (0.9, 0.1869), (0.95, 0.0572), (0.99, 0.0027)]


def test_eight_rollouts_fire_up_to_six_successes():
    assert injection_bound(8, threshold=0.8, **UNIFORM) == 6


def test_confidence_equal_to_the_threshold_does_not_fire():
    assert confidence(7, 8, **UNIFORM) == 0.8
    assert injection_bound(8, threshold=0.8, **UNIFORM) < 7


@pytest.mark.parametrize(("success_rate", "expected"), FIRING)
def test_firing_probability_is_the_table_of_the_specification(success_rate, expected):
    assert firing_probability(success_rate, 8, 6) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("success_rate", [0.05, 0.3, 0.7, 0.9])
def test_firing_probability_is_the_sum_over_all_outcomes(success_rate):
    bound = injection_bound(5, threshold=0.6, **UNIFORM)
    enumerated = sum(
        success_rate ** sum(outcome) * (1 - success_rate) ** (5 - sum(outcome))
        for outcome in product((0, 1), repeat=5)
        if sum(outcome) <= bound
    )
    assert firing_probability(success_rate, 5, bound) == pytest.approx(enumerated, abs=1e-12)


@pytest.mark.parametrize(("success_rate", "expected"), FIRING)
def test_a_hundred_thousand_simulated_groups_fire_as_often_as_computed(success_rate, expected):
    rng, groups = random.Random(0), 100_000
    bound = injection_bound(8, threshold=0.8, **UNIFORM)
    fired = sum(sum(rng.random() < success_rate for _ in range(8)) <= bound for _ in range(groups))
    probability = firing_probability(success_rate, 8, bound)
    sigma = (probability * (1 - probability) / groups) ** 0.5
    assert abs(fired / groups - probability) < 4 * sigma


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
    assert firing_probability(0.0, 8, -1) == 0.0


def test_a_group_in_which_all_succeed_is_never_injected():
    assert injection_bound(8, threshold=1.0, prior_success=1.0, prior_failure=100.0) == 7
